"""Linear evaluation of a frozen network at all of its widths: what `recipes/linear_eval.py` runs."""

import json
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration

from slimclr_hub.data.training import TrainData
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.feature_cache import FeatureCache, SplitFeatures, state_hash
from slimclr_hub.evaluate.linear_eval.batches import AugmentedBatches, CachedBatches, FeatureBatches
from slimclr_hub.evaluate.linear_eval.classes import check_labels
from slimclr_hub.evaluate.linear_eval.config import LinearEvalConfig, parse_linear_eval
from slimclr_hub.evaluate.linear_eval.folder import check_save_to, choose_folder, is_finished
from slimclr_hub.evaluate.linear_eval.network import save_with_head
from slimclr_hub.evaluate.linear_eval.probe import Head, Scaling, make_head, standardisation
from slimclr_hub.evaluate.linear_eval.report import best_rate, draw_accuracies, make_result, paper_row, print_result
from slimclr_hub.evaluate.linear_eval.training import ProbeTraining, Record
from slimclr_hub.evaluate.result import RESULT, EvalResult, load_result
from slimclr_hub.evaluate.subject import Subject, check_channels, check_images, default_output, open_subject
from slimclr_hub.files import write_text
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.runs.command_line import run_script
from slimclr_hub.runs.job import StopSignals
from slimclr_hub.weights.tensor_file import TensorFile, save_tensors

PROBE = 'probe.safetensors'


def main() -> None:
    """Read the command line, evaluate, and end with a table and a figure."""
    run_script(_main)


def _main() -> None:
    linear_eval(parse_linear_eval())


def linear_eval(config: LinearEvalConfig) -> EvalResult:
    """Train linear classifiers on a frozen network as configured, on the processes that accelerate was launched with.

    An evaluation of the same settings that was interrupted goes on; one that is finished is shown.

    Raises:
        InputError: Something in the configuration does not fit, found before training starts.
        DivergedError: No learning rate has a finite loss.
        PreemptedError: A signal asked to stop; the state is kept.
        RuntimeError: The frozen network has moved.
    """
    check_save_to(config)
    check_images(config.data)
    accelerator = _accelerator(config)
    subject = open_subject(config.network)
    check_channels(subject, config.data)
    backbone = subject.model
    backbone.reset_classifier(0)
    backbone.eval().requires_grad_(False).to(accelerator.device)
    if config.run.channels_last:
        backbone.to(memory_format=torch.channels_last)
    weights = state_hash(backbone)
    folder = choose_folder(config, weights, accelerator)
    evaluation = _Evaluation(config, accelerator, subject, folder, weights)
    if is_finished(folder):
        accelerator.print(f'{folder} is finished already; remove it to begin anew')
    else:
        accelerator.print(f'{folder}: {config.protocol}')
        evaluation.run()
    return evaluation.finish()


def check_frozen(backbone: SlimmableResNet, before: str) -> None:
    """Find out whether a network still is what it was.

    Args:
        backbone: The network.
        before: Its `state_hash` before.

    Raises:
        RuntimeError: It is not; accuracies of the probe are not those of the network that was asked for.
    """
    if state_hash(backbone) != before:
        raise RuntimeError('the frozen network has moved during linear evaluation; its accuracies are not valid')


class _Evaluation:
    def __init__(
        self, config: LinearEvalConfig, accelerator: Accelerator, subject: Subject, folder: Path, weights: str
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.subject = subject
        self.backbone = subject.model
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
        """Train, and write what came of it into the folder, the result last."""
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

    def finish(self) -> EvalResult:
        """Show the result in the folder and save the network if that is asked for."""
        config = self.config
        result = load_result(self.folder / RESULT)
        if self.accelerator.is_main_process:
            if config.save_to is not None:
                with TensorFile(self.folder / PROBE) as file:
                    head = {name: file.whole(name) for name in file.shapes}
                names = result.settings['class_names']
                save_with_head(self.backbone, head, Path(config.save_to), result, config.data, names)
            print_result(result, paper_row(self.subject.published, result.settings['probe']['head']))
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
        write_text(self.folder / 'metrics.jsonl', ''.join(json.dumps(record) + '\n' for record in history))
        draw_accuracies(history, result, self.folder / 'accuracy')
        result.save(self.folder)
        shutil.rmtree(self.folder / 'checkpoints', ignore_errors=True)


def _accelerator(config: LinearEvalConfig) -> Accelerator:
    try:
        return Accelerator(
            mixed_precision=config.run.precision,
            dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=True),
        )
    except ValueError as error:
        raise InputError(f'run.precision {config.run.precision}: {error}') from error
