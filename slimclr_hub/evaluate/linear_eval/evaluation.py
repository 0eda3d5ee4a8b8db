"""Linear evaluation of a frozen network at all of its widths: `recipes/linear_eval.py`.

FOLDER/settings.json        the settings that decide the result, and a hash of the network's weights
       checkpoints/         while it runs
       probe.safetensors    the linear layers, for features as the network gives them
       metrics.jsonl        one line an epoch: loss and accuracies of every learning rate
       accuracy.png, .pdf   the figure
       result.json          the accuracies; its presence says that the evaluation is finished
"""

import json
import os
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, broadcast_object_list

from slimclr_hub.data.sources import make_dataset
from slimclr_hub.data.training import TrainData
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.features import FeatureCache, SplitFeatures, state_hash
from slimclr_hub.evaluate.linear_eval.batches import AugmentedBatches, CachedBatches, FeatureBatches
from slimclr_hub.evaluate.linear_eval.config import BATCH_SIZE, LinearEvalConfig, parse_linear_eval
from slimclr_hub.evaluate.linear_eval.probe import Head, Scaling, make_head, standardisation
from slimclr_hub.evaluate.linear_eval.report import (
    best_rate,
    draw_accuracies,
    make_result,
    print_result,
    save_with_head,
)
from slimclr_hub.evaluate.linear_eval.training import ProbeTraining, Record
from slimclr_hub.evaluate.network import (
    NetworkUnderTest,
    changes,
    check_channels,
    check_images,
    check_network,
    default_output,
    open_for_test,
)
from slimclr_hub.evaluate.reported import reported_probe
from slimclr_hub.files import write_json_lines, write_text
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.runs.command_line import run_script
from slimclr_hub.runs.job import StopSignals
from slimclr_hub.runs.result import RESULT, Result, load, save
from slimclr_hub.settings import plain, relevant
from slimclr_hub.weights.tensor_file import TensorFile, save_tensors

PROBE = 'probe.safetensors'
SETTINGS = 'settings.json'


def main() -> None:
    """Read the command line, evaluate, print a table and draw a figure."""
    run_script(_main)


def _main() -> None:
    linear_eval(parse_linear_eval())


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
    check_network(config.network)
    check_images(config.data)
    try:
        accelerator = Accelerator(
            mixed_precision=config.run.precision,
            dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
        )
    except ValueError as error:
        raise InputError(f'run.precision {config.run.precision}: {error}') from error
    config = _with_fitting_batch(config, accelerator)
    network = open_for_test(config.network)
    check_channels(network, config.data)
    backbone = network.model
    backbone.reset_classifier(0)
    backbone.eval().requires_grad_(False).to(accelerator.device)
    if config.run.channels_last:
        backbone.to(memory_format=torch.channels_last)
    weights = state_hash(backbone)
    folder = _choose_folder(config, weights, accelerator)
    evaluation = _Evaluation(config, accelerator, network, folder, weights)
    if (folder / RESULT).is_file():
        accelerator.print(f'{folder} is finished already; remove it to begin anew')
    else:
        accelerator.print(f'{folder}: {config.protocol}')
        try:
            evaluation.run()
        except InputError:
            if accelerator.is_main_process and {path.name for path in folder.iterdir()} == {SETTINGS}:
                shutil.rmtree(folder)
            raise
    return evaluation.finish()


def check_labels(labels: torch.Tensor, num_classes: int, split: str) -> None:
    """Check that each image has a label that the probe can learn.

    Raises:
        InputError: One has none, or one beyond the classes.
    """
    least, most = labels.min().item(), labels.max().item()
    if least < 0:
        raise InputError(f'split {split} has images without a label; a linear evaluation needs one for each')
    if most >= num_classes:
        raise InputError(
            f'split {split} has class {most}, and there are {num_classes}; give --probe.num_classes {most + 1} or more'
        )


def check_frozen(backbone: SlimmableResNet, before: str) -> None:
    """Check that a network has not changed.

    Args:
        backbone: The network.
        before: Its `state_hash` before.

    Raises:
        RuntimeError: It has; accuracies of the probe are not those of the network that was asked for.
    """
    if state_hash(backbone) != before:
        raise RuntimeError('the frozen network has moved during linear evaluation; its accuracies are not valid')


class _Evaluation:
    def __init__(
        self, config: LinearEvalConfig, accelerator: Accelerator, network: NetworkUnderTest, folder: Path, weights: str
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.network = network
        self.backbone = network.model
        self.folder = folder
        self.weights = weights
        self.names: list[str] | None = None
        cache = config.features.cache
        self.cache = FeatureCache(
            Path(cache) if cache is not None else default_output(config.network, 'features'),
            accelerator,
            self.backbone,
            config.data,
        )

    def run(self) -> None:
        """Train, and write the results into the folder, `result.json` last."""
        config, accelerator = self.config, self.accelerator
        assert config.data.val_split is not None
        validation = self.cache.features(config.data.val_split)
        if config.features.mode == 'cached':
            train = self.cache.features(config.data.train_split, config.features.train_images)
            classes = self._classes(validation, int(train.labels.max()) + 1)
            check_labels(train.labels, classes, config.data.train_split)
        else:
            train = None
            classes = self._classes(validation, None)
        check_labels(validation.labels, classes, config.data.val_split)
        head = make_head(self.backbone, config.probe.head, classes, config.run.seed)
        scaling = standardisation(head, train.by_width) if train is not None and config.features.standardised else None
        batches = self._batches(train, scaling)
        with StopSignals() as signals:  # not before: until the features are there, there is no state to keep
            training = ProbeTraining(config, accelerator, head, batches, validation, scaling, self.folder, signals)
            history = training.run()
        check_frozen(self.backbone, self.weights)
        if accelerator.is_main_process:
            self._write(history, training.head(best_rate(history[-1])), classes, len(validation.labels))
        accelerator.wait_for_everyone()

    def finish(self) -> Result:
        """Print the result in the folder, and save the network if that is asked for."""
        config = self.config
        (result,) = load(self.folder / RESULT)
        if self.accelerator.is_main_process:
            if config.save_to is not None:
                with TensorFile(self.folder / PROBE) as file:
                    head = {name: file.whole(name) for name in file.shapes}
                save_with_head(self.backbone, head, Path(config.save_to), result, config.data)
            print_result(result, reported_probe(self.network.published, str(result.protocol.head)))
            print(f'Result: {self.folder / RESULT}\nFigure: {self.folder / "accuracy.png"}')
            if config.save_to is not None:
                print(f'Network with its head: slimclr-hub predict {config.save_to} IMAGE ...')
        self.accelerator.wait_for_everyone()
        return result

    def _classes(self, validation: SplitFeatures, found: int | None) -> int:
        names = validation.class_names
        classes = self.config.probe.num_classes or (len(names) if names else found)
        if classes is None:
            raise InputError(
                f'data.name {self.config.data.name} does not tell how many classes there are; give --probe.num_classes'
            )
        self.names = names if names and len(names) == classes else None
        return classes

    def _batches(self, train: SplitFeatures | None, scaling: Scaling | None) -> FeatureBatches:
        config, accelerator = self.config, self.accelerator
        shared = {'processes': accelerator.num_processes, 'rank': accelerator.process_index}
        if train is not None:
            if scaling is not None:
                for width, (shift, scale) in scaling.items():
                    train.by_width[width].sub_(shift).mul_(scale)  # in place: there may be gigabytes
            return CachedBatches(train, config.data.batch_size, config.run.seed, **shared)
        data = TrainData(
            config.data, config.views, seed=config.run.seed, view_count=1, device=accelerator.device, **shared
        )
        return AugmentedBatches(data, self.backbone, accelerator)

    def _write(self, history: list[Record], head: Head, classes: int, images: int) -> None:
        result = make_result(self.config, history, classes, images, self.names, self.weights)
        save_tensors(head.state_dict(), self.folder / PROBE)
        write_json_lines(self.folder / 'metrics.jsonl', history)
        draw_accuracies(history, result, self.folder / 'accuracy')
        save([result], self.folder)
        shutil.rmtree(self.folder / 'checkpoints', ignore_errors=True)


def _with_fitting_batch(config: LinearEvalConfig, accelerator: Accelerator) -> LinearEvalConfig:
    """The configuration with a batch that fits processes and images; the default one is lowered.

    Raises:
        InputError: Another one does not fit.
    """
    batch, processes = config.data.batch_size, accelerator.num_processes
    if batch % processes:
        nearest = max(round(batch / processes), 1) * processes
        raise InputError(
            f'data.batch_size {batch} does not divide over {processes} processes; nearest that fits: {nearest}'
        )
    if config.data.streams and config.features.mode == 'augmented':
        return config
    images = len(make_dataset(config.data, config.data.train_split, training=False))  # type: ignore[arg-type]
    images = min(images, config.features.train_images or images)
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


def _choose_folder(config: LinearEvalConfig, weights: str, accelerator: Accelerator) -> Path:
    """Find or make the folder of these settings on the main process, and tell the others.

    Raises:
        InputError: `run.output` has a result of other settings, or cannot be written to.
    """
    chosen: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            chosen[0] = _find_folder(config, weights)
        except (InputError, OSError) as error:
            chosen[0] = InputError(str(error))
    result = broadcast_object_list(chosen)[0]
    if isinstance(result, Exception):
        raise result
    return result


def _find_folder(config: LinearEvalConfig, weights: str) -> Path:
    settings = {**relevant(config), **relevant({'data': config.data.fingerprint()})}
    settings |= {'optim.lr': plain(config.optim.rates), 'weights': weights}
    first = Path(config.run.output) if config.run.output is not None else default_output(config.network, 'linear_eval')
    for number in count(1):
        folder = first if number == 1 else first.with_name(f'{first.name}-{number}')
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / SETTINGS, json.dumps(settings, indent=2) + '\n')
            return folder
        differing = _changes(folder, settings)
        if not differing:
            return folder
        if config.run.output is not None:
            raise InputError(
                f'run.output {folder} has {"; ".join(differing)}; give another run.output, or these values'
            )
    raise AssertionError


def _changes(folder: Path, settings: dict[str, Any]) -> list[str]:
    try:
        recorded = relevant(json.loads((folder / SETTINGS).read_text()))
    except (OSError, ValueError):
        return ['no linear evaluation, but other files']
    if recorded.get('weights') != settings['weights']:
        return ['been made of other weights']
    return changes(recorded, settings)
