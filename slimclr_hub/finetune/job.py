"""Fine-tuning of a network on images with classes: `recipes/finetune.py`.

FOLDER/settings.json        the settings that decide the result, and a hash of the weights that it began with
       metrics.jsonl        losses every few steps, and the accuracies of each epoch
       checkpoints/         while it runs
       config.json, model.safetensors, README.md       the network with its classifier, which timm opens
       training.png, .pdf   the figure
       result.json          the accuracies; its presence says that the fine-tuning is finished
"""

import shutil
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed

from slimclr_hub.data.loaders import eval_loader
from slimclr_hub.data.sources import Images, known_classes, labels_of, make_dataset
from slimclr_hub.distributed import from_main_process
from slimclr_hub.errors import InputError, shorten
from slimclr_hub.evaluate.features import check_labels
from slimclr_hub.evaluate.network import check_channels, check_images, default_output
from slimclr_hub.evaluate.repetitions import print_spread, repetitions
from slimclr_hub.evaluate.settings_folder import find_folder, working_in
from slimclr_hub.finetune.config import BATCH_SIZE, FinetuneConfig, parse_finetune
from slimclr_hub.finetune.network import fit_head, give_classes, has_statistics, open_start
from slimclr_hub.finetune.training import FineTuning, last_accuracies
from slimclr_hub.hub.card import finetuned_card
from slimclr_hub.hub.folder import save_folder
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.cost import width_facts
from slimclr_hub.runs.checkpoints import newest
from slimclr_hub.runs.command_line import run_script
from slimclr_hub.runs.job import StopSignals
from slimclr_hub.runs.result import RESULT, Result, environment, load, save
from slimclr_hub.runs.tables import TextTable
from slimclr_hub.settings import plain, relevant
from slimclr_hub.train.report import draw_figure
from slimclr_hub.train.run_folder import RunFolder
from slimclr_hub.train.trainer import make_accelerator
from slimclr_hub.weights.hashes import state_hash

_STEPS = 4  # of an epoch, at least, by the default batch
_LEAST_BATCH = 8
_FITTED = 10_000  # images, at most, that a classifier is fitted to


def main() -> None:
    """Read the command line, fine-tune, print a table and draw a figure."""

    def work() -> None:
        config = parse_finetune()
        results = [finetune(each) for each in repetitions(config)]
        if PartialState().is_main_process:
            print_spread(results)
        PartialState().destroy_process_group()

    run_script(work)


def finetune(config: FinetuneConfig) -> Result:
    """Fine-tune a network, on the processes that accelerate was launched with.

    A fine-tuning of the same settings that was interrupted is resumed, and the result of a finished one is shown.

    Raises:
        InputError: Something in the configuration does not fit; nothing is left behind.
        DivergedError: The loss is not finite.
        PreemptedError: A signal asked to stop; the state is kept.
    """
    check_images(config.data)
    run = config.run
    accelerator = make_accelerator(run.precision, run, run.output, find_unused_parameters=False)
    # The settings record the precision that accelerate was launched with.
    config = replace(config, run=replace(run, precision=accelerator.mixed_precision))
    images = _Splits.of(config)
    classes, names = _classes(config, images, accelerator)
    config = _with_fitting_batch(config, accelerator, images)
    set_seed(config.run.seed)
    network = open_start(config.network, config.model)
    check_channels(config.network, network, config.data)
    kept = give_classes(network, classes, names)
    network.to(accelerator.device)
    settings = {**relevant(config), **relevant({'data': config.data.fingerprint()}), 'weights': state_hash(network)}
    default = default_output(config.network, 'finetune')
    folder = from_main_process(lambda: find_folder(settings, default, config.run.output, 'fine-tuning'))
    if (folder / RESULT).is_file():
        accelerator.print(f'{folder} is finished already; remove it to begin anew')
    else:
        accelerator.print(f'{folder}: {"the classifier is kept" if kept else f"a new classifier of {classes} classes"}')
        with working_in(folder, accelerator):
            _train(config, accelerator, network, images, folder, names, kept)
    (result,) = load(folder / RESULT)
    if accelerator.is_main_process:
        print_result(result)
        print(
            f'Result: {folder / RESULT}\nFigure: {folder / "training.png"}\n'
            f'Try it: slimclr-hub predict {folder} IMAGE ...'
        )
    accelerator.wait_for_everyone()
    return result


@dataclass(frozen=True)
class _Splits:
    """The images to train and to test on, opened once: listing large folders takes minutes. None of a stream."""

    train: Images | None
    test: Images | None

    @classmethod
    def of(cls, config: FinetuneConfig) -> '_Splits':
        data = config.data
        assert data.val_split is not None
        if data.streams:
            return cls(None, None)
        return cls(make_dataset(data, data.train_split), make_dataset(data, data.val_split))


def _classes(config: FinetuneConfig, images: _Splits, accelerator: Accelerator) -> tuple[int, list[str] | None]:
    """Number and names of the classes, as far as they are known before training."""
    data, train = config.data, images.train
    if train is None:
        if config.model.num_classes is None:
            raise InputError(f'data.name {data.name} is a stream, which tells no classes; give --model.num_classes')
        return config.model.num_classes, None
    labels = labels_of(train)
    names = list(train.class_names) if train.class_names else None
    classes = config.model.num_classes or (len(names) if names else known_classes(train))
    where = f'data.name {data.name}, data.root {data.root}'
    if labels is not None and labels.min() < 0:
        labels = None
    if labels is not None and len(np.unique(labels)) == 1:
        raise InputError(f'{where}: all training images are of one class; there is nothing to tell apart')
    if classes is None:
        raise InputError(f'{where} does not tell how many classes there are; give --model.num_classes')
    if classes == 0:
        raise InputError(f'{where}: the images have no classes; let each class have a folder')
    assert images.test is not None
    if (tested := labels_of(images.test)) is not None:
        check_labels(torch.from_numpy(tested), classes, str(data.val_split), 'model.num_classes')
        if labels is not None:
            _note_missing(config, labels, tested, names, accelerator)
    return classes, names if names and len(names) == classes else None


def _note_missing(
    config: FinetuneConfig, labels: np.ndarray, tested: np.ndarray, names: list[str] | None, accelerator: Accelerator
) -> None:
    for split, missing in (
        (config.data.val_split, np.setdiff1d(labels, tested)),
        (config.data.train_split, np.setdiff1d(tested, labels)),
    ):
        if len(missing):
            listed = shorten([names[label] if names else str(label) for label in missing.tolist()])
            accelerator.print(f'Note: the split {split} has no image of the classes {listed}')


def _with_fitting_batch(config: FinetuneConfig, accelerator: Accelerator, images: _Splits) -> FinetuneConfig:
    """Lower the default batch so that an epoch of few images has several steps."""
    data, shares = config.data, accelerator.num_processes * config.optim.accumulation_steps
    if images.train is None or data.batch_size != BATCH_SIZE or len(images.train) >= _STEPS * BATCH_SIZE:
        return config
    count, fitting = len(images.train), BATCH_SIZE
    while fitting > max(_LEAST_BATCH, 2 * shares) and fitting * _STEPS > count:
        fitting //= 2
    accelerator.print(f'data.batch_size is {fitting} instead of {BATCH_SIZE}: there are {count} training images')
    return replace(config, data=replace(data, batch_size=fitting))


def _train(
    config: FinetuneConfig,
    accelerator: Accelerator,
    network: SlimmableResNet,
    images: _Splits,
    path: Path,
    names: list[str] | None,
    kept: bool,
) -> None:
    """Train, and write the network and its result into the folder, `result.json` last."""
    data = config.data
    assert data.val_split is not None
    load = partial(eval_loader, data, seed=config.run.seed, processes=accelerator.num_processes)
    validation = load(data.val_split, None, images=images.test)
    folder = RunFolder(path, accelerator)
    fits = config.model.fit_head and not kept and has_statistics(network)
    if fits and from_main_process(lambda: newest(path).path is None):
        fit_head(network, load(data.train_split, _FITTED, images=images.train), data.train_split, accelerator)
    with StopSignals() as signals:
        training = FineTuning(config, accelerator, signals, network, images.train, validation, folder)
        training.run()
    if accelerator.is_main_process:
        metrics, trained = folder.read_metrics(), training.network.eval()
        result = Result(
            str(path),
            config.protocol,
            last_accuracies(metrics, 'top1'),
            last_accuracies(metrics, 'top5'),
            images=metrics[-1]['images'],
            settings={**plain(asdict(config)), 'classes': trained.num_classes, 'class_names': names},
            environment=environment(),
        )
        card = finetuned_card(width_facts(trained, data.size), _about(config, path), result)
        save_folder(trained, path, **data.look, card=card, label_names=names)
        draw_figure(metrics, trained.widths, path / 'training')
        save([result], path)
        shutil.rmtree(path / 'checkpoints', ignore_errors=True)
    for tracker in accelerator.trackers:
        tracker.finish()  # the processes go on: there may be another repetition
    accelerator.wait_for_everyone()


def _about(config: FinetuneConfig, path: Path) -> dict[str, str]:
    data = config.data
    return {
        'name': path.name,
        'folder': str(path),
        'network': config.network,
        'data': data.name if data.root is None else f'{data.name} {data.root}',
        'split': str(data.val_split),
        'epochs': str(config.optim.epochs),
        'size': str(data.size),
    }


# The end


def print_result(result: Result) -> None:
    """Print the accuracies of each width, and how they were measured."""
    measured = {'top-1': result.top1, **({'top-5': result.top5} if result.top5 else {})}
    rows = [
        [f'{width:g}', *(f'{values[width]:.1f}' for values in measured.values()), f'{result.standard_error(width):.1f}']
        for width in result.top1
    ]
    start = result.settings['network']
    notes = [f'{result.protocol.epochs} epochs from {start}; {result.images} test images.']
    TextTable('fine-tuning (%)', ['width', *measured, 'standard error'], rows, notes, names=0).print()
