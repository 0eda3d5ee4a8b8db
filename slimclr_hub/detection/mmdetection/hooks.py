"""Hooks of mmengine: the end of a run as a table and a picture, and checkpoints that are neither replaced nor mixed."""

from collections.abc import Container
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import master_only
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner

from slimclr_hub.detection.mmdetection.report import History, draw_history, precision_table
from slimclr_hub.detection.mmdetection.widths import unwrapped
from slimclr_hub.errors import InputError, shorten
from slimclr_hub.weights.layouts import differences

_HEADS = ('rpn_head.', 'roi_head.', 'bbox_head.', 'mask_head.')


@HOOKS.register_module()
class WidthReportHook(Hook):
    """Keeps the AP of every width in `ap_by_width.json`; prints a table and draws a picture at the end.

    Both are in the run's folder, `work_dir`, by epoch, or by iteration where the loop counts these. A resumed run goes
    on with the file.
    """

    priority = 'LOWEST'

    def before_train(self, runner: Runner) -> None:
        """Begin the file anew, unless the run goes on."""
        self._unit = 'iteration' if isinstance(runner.train_loop, IterBasedTrainLoop) else 'epoch'
        self._history = History(Path(runner.work_dir) / 'ap_by_width.json', resumed=runner.iter > 0)

    @master_only
    def after_val_epoch(self, runner: Runner, metrics: dict[str, Any] | None = None) -> None:
        """Note the metrics; in a run of validation alone, print them."""
        if not metrics:
            return
        if hasattr(self, '_history'):
            self._history.add(runner.iter if self._unit == 'iteration' else runner.epoch, metrics)
        else:
            self._print(runner, metrics)

    @master_only
    def after_test_epoch(self, runner: Runner, metrics: dict[str, Any] | None = None) -> None:
        """Print the table of a test."""
        self._print(runner, metrics or {})

    @master_only
    def after_train(self, runner: Runner) -> None:
        """Print the table of the last evaluation, and draw all of them."""
        if not self._history.metrics:
            return
        last = max(self._history.metrics)
        self._print(runner, self._history.metrics[last], f' after {self._unit} {last}')
        figure = Path(runner.work_dir) / 'ap_by_width.png'
        if draw_history(self._history.metrics, self._unit, figure):
            runner.logger.info(f'Figure: {figure}')

    def _print(self, runner: Runner, metrics: dict[str, Any], when: str = '') -> None:
        network = unwrapped(runner.model).backbone.network
        parameters = {w: sum(p.numel() for p in network.extract(w).parameters()) for w in network.widths}
        if table := precision_table(metrics, parameters):
            runner.logger.info(f'Average precision (%) by width{when}\n{table}')


@HOOKS.register_module()
class CheckpointGuardHook(Hook):
    """Checkpoints are neither overwritten by another run nor loaded in part, which mmengine would only warn of.

    Args:
        other_heads: Whether heads may be others than the checkpoint's, as for fine-tuning a detector on other classes;
            they are then named in the log.

    Raises:
        InputError: A new run begins in a folder that holds the checkpoints of another, a checkpoint is of another
            detector, or the best one is to be chosen by a metric that does not name a width.
    """

    def __init__(self, other_heads: bool = False) -> None:
        self.other_heads = other_heads

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare names and shapes with the detector's; this is before anything of it is loaded."""
        tensors = checkpoint.get('state_dict', checkpoint)
        found = {
            name.removeprefix('module.'): value.shape
            for name, value in tensors.items()
            if isinstance(value, torch.Tensor)
        }
        wanted = {name: tensor.shape for name, tensor in unwrapped(runner.model).state_dict().items()}
        problems = differences(wanted, found)
        if self.other_heads:
            heads = [problem for problem in problems if problem.startswith(_HEADS)]
            problems = [problem for problem in problems if not problem.startswith(_HEADS)]
            if heads:
                print_log(f'Not taken from the checkpoint: {shorten(heads)}', 'current')
        if problems:
            raise InputError(f'the checkpoint is of another detector: {shorten(problems)}{_remedy(found)}')

    def before_train(self, runner: Runner) -> None:
        """Look for checkpoints, unless the run goes on, and for what the best one is chosen by."""
        if runner.iter == 0 and (Path(runner.work_dir) / 'last_checkpoint').exists():
            raise InputError(
                f'{runner.work_dir} holds the checkpoints of another run: add --resume to go on with it, or choose '
                'another folder with --work-dir'
            )
        saving = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook) and hook.save_best]
        for metric in chain.from_iterable(hook.key_indicators for hook in saving):
            if metric != 'auto' and not metric.startswith('width_'):
                raise InputError(f'save_best {metric!r} names no width; give one, such as width_1.00/{metric}')


def _remedy(found: Container[str]) -> str:
    if 'backbone.conv1.weight' in found:
        return ". `slimclr-hub convert` brings over a detector of the authors; one of MMDetection's has one width"
    if 'backbone.network.conv1.weight' in found:
        return (
            '. Widths, classes and kind of the detector have to be those of the config that it was trained with; '
            'custom_hooks.1.other_heads=True leaves out the heads'
        )
    return '. What a backbone starts from goes into model.backbone.weights'
