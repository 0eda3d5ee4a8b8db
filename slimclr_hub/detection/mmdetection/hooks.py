"""Hooks of mmengine: the end of a run as a table and a picture, and checkpoints that no other run overwrites."""

from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from slimclr_hub.detection.mmdetection.report import History, draw_history, precision_table
from slimclr_hub.errors import InputError
from slimclr_hub.models.cost import cost
from slimclr_hub.weights.layouts import shorten

_IMAGE = 224  # pixels of the images that multiply-adds are counted for, as everywhere in this package


@HOOKS.register_module()
class WidthReportHook(Hook):
    """Keeps the AP of every width and epoch in `ap_by_width.json`; prints a table and draws a picture at the end.

    Both are in the run's folder, `work_dir`. A resumed run goes on with the file.
    """

    priority = 'LOWEST'

    def before_train(self, runner: Runner) -> None:
        """Begin the file anew, unless the run goes on."""
        self._history = History(Path(runner.work_dir) / 'ap_by_width.json', resumed=runner.iter > 0)

    @master_only
    def after_val_epoch(self, runner: Runner, metrics: dict[str, Any] | None = None) -> None:
        """Note the metrics of this epoch; in a run of validation alone, print them."""
        if not metrics:
            return
        if hasattr(self, '_history'):
            self._history.add(runner.epoch, metrics)
        else:
            self._print(runner, metrics)

    @master_only
    def after_test_epoch(self, runner: Runner, metrics: dict[str, Any] | None = None) -> None:
        """Print the table of a test."""
        self._print(runner, metrics or {})

    @master_only
    def after_train(self, runner: Runner) -> None:
        """Print the table of the last epoch, and draw all of them."""
        if not self._history.epochs:
            return
        last = max(self._history.epochs)
        self._print(runner, self._history.epochs[last], f'after epoch {last}')
        figure = Path(runner.work_dir) / 'ap_by_width.png'
        draw_history(self._history.epochs, figure)
        runner.logger.info(f'Figure: {figure}')

    def _print(self, runner: Runner, metrics: dict[str, Any], when: str = '') -> None:
        network = _unwrapped(runner.model).backbone.network
        parameters = {width: cost(network, width, _IMAGE)[0] for width in network.widths}
        runner.logger.info(f'Average precision (%) by width {when}\n{precision_table(metrics, parameters)}')


@HOOKS.register_module()
class CheckpointGuardHook(Hook):
    """Checkpoints are neither overwritten by another run nor loaded in part, which mmengine would only warn of.

    Raises:
        InputError: A new run begins in a folder that holds the checkpoints of another, or a checkpoint is of another
            detector.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare names and shapes with the detector's; this is before anything of it is loaded."""
        wanted = {name: tuple(tensor.shape) for name, tensor in _unwrapped(runner.model).state_dict().items()}
        tensors = checkpoint.get('state_dict', checkpoint)
        found = {
            name.removeprefix('module.'): tuple(value.shape)
            for name, value in tensors.items()
            if isinstance(value, torch.Tensor)
        }
        problems = [f'missing {name}' for name in wanted if name not in found]
        problems += [f'unexpected {name}' for name in found if name not in wanted]
        problems += [
            f'{name} has shape {list(found[name])} instead of {list(shape)}'
            for name, shape in wanted.items()
            if found.get(name, shape) != shape
        ]
        if problems:
            raise InputError(f'the checkpoint is of another detector: {shorten(problems)}{_remedy(found)}')

    def before_train(self, runner: Runner) -> None:
        """Look for checkpoints, unless the run goes on."""
        if runner.iter == 0 and (Path(runner.work_dir) / 'last_checkpoint').exists():
            raise InputError(
                f'{runner.work_dir} holds the checkpoints of another run: add --resume to go on with it, or choose '
                'another folder with --work-dir'
            )


def _unwrapped(model: nn.Module) -> Any:
    return model.module if is_model_wrapper(model) else model


def _remedy(found: Container[str]) -> str:
    if 'backbone.conv1.weight' in found:
        return ". `slimclr-hub convert` brings over a detector of the authors; one of MMDetection's has one width"
    if 'backbone.network.conv1.weight' in found:
        return '. Widths, classes and kind of the detector have to be those of the config that it was trained with'
    return '. What a backbone starts from goes into model.backbone.weights'
