"""Linear evaluation of a frozen network at all of its widths: `recipes/linear_eval.py`.

FOLDER/settings.json        the settings that decide the result, and a hash of the network's weights
       checkpoints/         while it runs
       probe.safetensors    the linear layers, for features as the network gives them
       metrics.jsonl        one line an epoch: loss and accuracies of every learning rate
       accuracy.png, .pdf   the figure
       result.json          the accuracies; its presence says that the evaluation is finished
       baselines/           the same of random weights and raw pixels, where they are asked for
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState

from slimclr_hub.data.loaders import eval_loader
from slimclr_hub.data.training import TrainData
from slimclr_hub.distributed import from_main_process
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.baselines import Encoder
from slimclr_hub.evaluate.features import FeatureCache, check_labels
from slimclr_hub.evaluate.linear_eval.config import BATCH_SIZE, LinearEvalConfig, parse_linear_eval
from slimclr_hub.evaluate.linear_eval.probe import make_head, standardisation
from slimclr_hub.evaluate.linear_eval.report import (
    accuracies_figure,
    best_rate,
    make_result,
    print_result,
    save_with_head,
)
from slimclr_hub.evaluate.linear_eval.training import AugmentedBatches, CachedBatches, FeatureBatches, ProbeTraining
from slimclr_hub.evaluate.network import (
    check_images,
    check_network,
    default_output,
    drawn_anew,
    open_encoder,
    published_network,
)
from slimclr_hub.evaluate.repetitions import print_spread, repetitions
from slimclr_hub.evaluate.reported import reported_probe
from slimclr_hub.evaluate.settings_folder import find_folder, working_in
from slimclr_hub.files import write_json_lines
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.runs.command_line import run_script
from slimclr_hub.runs.figures import save_figure
from slimclr_hub.runs.job import StopSignals
from slimclr_hub.runs.launcher import launched
from slimclr_hub.runs.result import RANDOM_WEIGHTS, RAW_PIXELS, RESULT, Result, load, save
from slimclr_hub.settings import plain, relevant
from slimclr_hub.weights.hashes import state_hash
from slimclr_hub.weights.tensor_file import TensorFile, save_tensors

PROBE = 'probe.safetensors'
_CLASSES = 'probe.num_classes'


def main() -> None:
    """Read the command line, evaluate, print a table and draw a figure."""

    def work() -> None:
        results = [linear_eval(each) for each in repetitions(parse_linear_eval())]
        if PartialState().is_main_process:
            print_spread(results)

    run_script(work)


def linear_eval(config: LinearEvalConfig) -> Result:
    """Train linear classifiers on a frozen network, on the processes that accelerate was launched with.

    An evaluation of the same settings that was interrupted is resumed, and the result of a finished one is shown.

    Raises:
        InputError: Something in the configuration does not fit; nothing is left behind.
        DivergedError: No learning rate has a finite loss.
        PreemptedError: A signal asked to stop; the state is kept.
        RuntimeError: The frozen network has changed.
    """
    _check_save_to(config)
    if config.network != RAW_PIXELS:
        check_network(drawn_anew(config.network) or config.network)
    check_images(config.data)
    accelerator = launched(config.run.precision)
    # The settings record the precision that accelerate was launched with.
    config = replace(config, run=replace(config.run, precision=accelerator.mixed_precision))
    config = _with_fitting_batch(config, accelerator)
    if config.network == RAW_PIXELS and config.save_to is not None:
        raise InputError(f'save_to {config.save_to}: raw pixels have no network to save; leave it out')
    backbone = open_encoder(config.network, config.data, config.run.seed)
    backbone.reset_classifier(0)
    backbone.eval().requires_grad_(False).to(accelerator.device)
    if config.run.channels_last:
        backbone.to(memory_format=torch.channels_last)
    weights = state_hash(backbone)
    folder = from_main_process(lambda: _find_folder(config, weights))
    if (folder / RESULT).is_file():
        accelerator.print(f'{folder} is finished already; remove it to begin anew')
    else:
        accelerator.print(f'{folder}: {config.protocol}')
        with working_in(folder, accelerator):
            _train(config, accelerator, backbone, folder, weights)
    if config.baselines:
        _add_baselines(config, accelerator, folder)
    result, *pixels = load(folder / RESULT)
    if accelerator.is_main_process:
        if config.save_to is not None:
            assert isinstance(backbone, SlimmableResNet)
            with TensorFile(folder / PROBE) as file:
                head = {name: file.whole(name) for name in file.shapes}
            save_with_head(backbone, head, Path(config.save_to), result, config.data)
        reported = reported_probe(published_network(config.network), str(result.protocol.head))
        print_result(result, reported, pixels[0] if pixels else None)
        print(f'Result: {folder / RESULT}\nFigure: {folder / "accuracy.png"}')
        if config.save_to is not None:
            print(f'Network with its head: slimclr-hub predict {config.save_to} IMAGE ...')
    accelerator.wait_for_everyone()
    return result


def _add_baselines(config: LinearEvalConfig, accelerator: Accelerator, folder: Path) -> None:
    """Evaluate random weights and raw pixels by the same protocol, and add them to a result that has none yet."""
    own, *others = load(folder / RESULT)
    if others:
        return
    features = replace(config.features, cache=str(_features_folder(config)))
    drawn, pixels = (
        linear_eval(
            replace(
                config,
                network=network,
                save_to=None,
                baselines=False,
                features=features,
                run=replace(config.run, output=str(folder / 'baselines' / name)),
            )
        )
        for name, network in (('random', f'{RANDOM_WEIGHTS} of {config.network}'), ('pixels', RAW_PIXELS))
    )
    if accelerator.is_main_process:
        save([replace(own, start=drawn.top1), pixels], folder)
    accelerator.wait_for_everyone()


def _features_folder(config: LinearEvalConfig) -> Path:
    cache = config.features.cache
    return Path(cache) if cache is not None else default_output(config.network, 'features')


def check_frozen(backbone: Encoder, before: str) -> None:
    """Raise a RuntimeError if a network has another `state_hash` than before: its accuracies are not its own."""
    if state_hash(backbone) != before:
        raise RuntimeError('the frozen network has moved during linear evaluation; its accuracies are not valid')


def _train(
    config: LinearEvalConfig,
    accelerator: Accelerator,
    backbone: Encoder,
    folder: Path,
    weights: str,
) -> None:
    """Train, and write the results into the folder, `result.json` last."""
    data, features = config.data, config.features
    assert data.val_split is not None
    cache = FeatureCache(_features_folder(config), accelerator, backbone, data)
    validation, train = cache.features(data.val_split), None
    names, classes = validation.class_names, config.probe.num_classes
    classes = classes or (len(names) if names else None)
    if features.mode == 'cached':
        train = cache.features(data.train_split, features.train_images)
        classes = classes or int(train.labels.max()) + 1
        check_labels(train.labels, classes, data.train_split, _CLASSES)
        if len(train.labels) < data.batch_size:
            raise InputError(
                f'data.batch_size {data.batch_size} is larger than the {len(train.labels)} training images that can be '
                f'read; give at most {len(train.labels)}'
            )
    if classes is None:
        raise InputError(f'data.name {data.name} does not tell how many classes there are; give --probe.num_classes')
    check_labels(validation.labels, classes, data.val_split, _CLASSES)
    head = make_head(backbone, config.probe.head, classes, config.run.seed)
    scaling = standardisation(head, train.by_width) if train is not None and features.standardised else None
    shared = {'seed': config.run.seed, 'processes': accelerator.num_processes, 'rank': accelerator.process_index}
    batches: FeatureBatches
    if train is not None:
        for width, (shift, scale) in (scaling or {}).items():
            train.by_width[width].sub_(shift).mul_(scale)  # in place: there may be gigabytes
        batches = CachedBatches(train, data.batch_size, **shared)
    else:
        views = TrainData(
            data,
            config.views,
            view_count=1,
            device=accelerator.device,
            num_classes=classes,
            classes_key=_CLASSES,
            **shared,
        )
        batches = AugmentedBatches(views, backbone, accelerator)
    with StopSignals() as signals:  # not before: until the features are there, there is no state to keep
        training = ProbeTraining(config, accelerator, head, batches, validation, scaling, folder, signals)
        history = training.run()
    check_frozen(backbone, weights)
    if accelerator.is_main_process:
        names = names if names and len(names) == classes else None
        result = make_result(config, history, classes, len(validation.labels), names, weights)
        save_tensors(training.head(best_rate(history[-1])).state_dict(), folder / PROBE)
        write_json_lines(folder / 'metrics.jsonl', history)
        save_figure(accuracies_figure(history, result), folder / 'accuracy')
        save([result], folder)
        shutil.rmtree(folder / 'checkpoints', ignore_errors=True)
    accelerator.wait_for_everyone()


def _with_fitting_batch(config: LinearEvalConfig, accelerator: Accelerator) -> LinearEvalConfig:
    """Lower the default batch to one that fits processes and images; raise an InputError if another does not fit."""
    batch, processes = config.data.batch_size, accelerator.num_processes
    if batch % processes:
        nearest = max(round(batch / processes), 1) * processes
        raise InputError(
            f'data.batch_size {batch} does not divide over {processes} processes; nearest that fits: {nearest}'
        )
    if config.data.streams and config.features.mode == 'augmented':
        return config
    images = eval_loader(config.data, config.data.train_split, config.features.train_images, 0).total
    if batch <= images:
        return config
    if batch != BATCH_SIZE or images < processes:
        raise InputError(f'data.batch_size {batch} is larger than the data set of {images} images')
    fitting = images // processes * processes
    accelerator.print(f'data.batch_size is {fitting} instead of {BATCH_SIZE}: there are {images} training images')
    return replace(config, data=replace(config.data, batch_size=fitting))


# The folder


def _check_save_to(config: LinearEvalConfig) -> None:
    if config.save_to is None:
        return
    folder = Path(config.save_to)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f'save_to {folder} is there already; give the name of a new folder, or remove it')
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f'save_to {folder}: {parent} is not a folder that can be written to; give another one')


def _find_folder(config: LinearEvalConfig, weights: str) -> Path:
    """Find or make the folder of these settings."""
    settings = {**relevant(config), **relevant({'data': config.data.fingerprint()})}
    settings |= {'optim.lr': plain(config.optim.rates), 'weights': weights}
    return find_folder(settings, default_output(config.network, 'linear_eval'), config.run.output, 'linear evaluation')
