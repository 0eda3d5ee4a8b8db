"""Loops of mmengine that evaluate every width, and hooks that report AP by width and guard checkpoints."""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import master_only
from mmengine.evaluator import Evaluator
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS, LOOPS
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner, TestLoop, ValLoop

from slimclr_hub.detection.precision import History, by_width, draw_history, precision_table, width_name
from slimclr_hub.detection.widths import unwrapped
from slimclr_hub.errors import InputError, shorten
from slimclr_hub.models.widths import check_width
from slimclr_hub.weights.layouts import mismatches

_HEADS = ('rpn_head.', 'roi_head.', 'bbox_head.', 'mask_head.')
_FILES: dict[str, Callable[[str, str], str]] = {
    'outfile_prefix': lambda prefix, name: f'{prefix}.{name}',  # of CocoMetric
    'out_file_path': lambda path, name: str(Path(path).with_suffix(f'.{name}{Path(path).suffix}')),  # of mim test --out
    'test_out_dir': lambda folder, name: str(Path(folder) / name),  # of mim test --show-dir
}


class WidthLoop(BaseLoop):
    """Evaluate several widths, all by default; an InputError if the network does not hold one of them."""

    stage: str
    evaluator: Evaluator

    def __init__(self, *args: Any, widths: Sequence[float] | float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        detector = unwrapped(self.runner.model)
        if not hasattr(detector, 'set_width'):
            kind = type(detector).__name__
            raise InputError(f'{kind} has no widths to evaluate; use a type such as SlimmableMaskRCNN')
        if isinstance(widths, float | int):  # a single value on the command line comes as a number
            widths = [widths]
        self.widths = tuple(check_width(w, detector.widths) for w in (detector.widths if widths is None else widths))

    def run(self) -> dict[str, Any]:
        """Evaluate the widths one after the other; return `width_0.50/coco/bbox_mAP` and so on."""
        detector = unwrapped(self.runner.model)
        self.runner.call_hook(f'before_{self.stage}')
        self.runner.call_hook(f'before_{self.stage}_epoch')
        self.runner.model.eval()
        metrics = {}
        for width in self.widths:
            self.runner.logger.info(f'{self.stage} at width {width:g}')
            with detector.set_width(width), self._own_files(width):
                for i, batch in enumerate(self.dataloader):
                    self.run_iter(i, batch)
                found = self.evaluator.evaluate(len(self.dataloader.dataset))
            metrics.update({f'{width_name(width)}/{key}': value for key, value in found.items()})
        # Once, with all of them: hooks log them, and choose the best checkpoint by one.
        self.runner.call_hook(f'after_{self.stage}_epoch', metrics=metrics)
        self.runner.call_hook(f'after_{self.stage}')
        return metrics

    @contextmanager
    def _own_files(self, width: float) -> Iterator[None]:
        # Otherwise each width would overwrite the predictions and drawings of the one before.
        before = []
        for owner in (*self.evaluator.metrics, *self.runner.hooks):
            for key, place in _FILES.items():
                if isinstance(value := getattr(owner, key, None), str):
                    before.append((owner, key, value))
                    setattr(owner, key, place(value, width_name(width)))
        try:
            yield
        finally:
            for owner, key, value in before:
                setattr(owner, key, value)


@LOOPS.register_module()
class SlimmableValLoop(WidthLoop, ValLoop):
    """Validate several widths; see `WidthLoop`."""

    stage = 'val'


@LOOPS.register_module()
class SlimmableTestLoop(WidthLoop, TestLoop):
    """Test several widths, or one of them by `--cfg-options test_cfg.widths=0.5`; see `WidthLoop`."""

    stage = 'test'


@HOOKS.register_module()
class WidthReportHook(Hook):
    """Keep the AP of every width in `ap_by_width.json`; log a table and draw `ap_by_width.png` at the end.

    Both are in `work_dir`, by epoch, or by iteration if the loop counts these. A resumed run goes on with the file.
    """

    priority = 'LOWEST'

    def before_train(self, runner: Runner) -> None:
        """Start the history, or go on with that of a resumed run."""
        self._unit = 'iteration' if isinstance(runner.train_loop, IterBasedTrainLoop) else 'epoch'
        self._history = History(Path(runner.work_dir) / 'ap_by_width.json', resumed=runner.iter > 0)

    @master_only
    def after_val_epoch(self, runner: Runner, metrics: dict[str, Any] | None = None) -> None:
        """Add the metrics to the history; without training, log their table."""
        if not metrics:
            return
        if hasattr(self, '_history'):
            self._history.add(runner.iter if self._unit == 'iteration' else runner.epoch, metrics)
        else:
            self._log(runner, metrics)

    @master_only
    def after_test_epoch(self, runner: Runner, metrics: dict[str, Any] | None = None) -> None:
        """Log the table of a test."""
        self._log(runner, metrics or {})

    @master_only
    def after_train(self, runner: Runner) -> None:
        """Log the table of the last evaluation and draw all evaluations."""
        if not self._history.metrics:
            return
        last = max(self._history.metrics)
        self._log(runner, self._history.metrics[last], f' after {self._unit} {last}')
        figure = Path(runner.work_dir) / 'ap_by_width.png'
        if draw_history(self._history.metrics, self._unit, figure):
            runner.logger.info(f'Figure: {figure}')

    def _log(self, runner: Runner, metrics: dict[str, Any], when: str = '') -> None:
        if table := precision_table(by_width(metrics), unwrapped(runner.model).backbone.network):
            runner.logger.info(f'Average precision (%) by width{when}\n{table}')


@HOOKS.register_module()
class CheckpointGuardHook(Hook):
    """Refuse to overwrite the checkpoints of another run or to load a checkpoint in part, where mmengine only warns.

    Args:
        other_heads: Allow heads that differ from the checkpoint's, as in fine-tuning on other classes; they are then
            named in the log.

    Raises:
        InputError: A new run starts in a folder that holds the checkpoints of another, a checkpoint is of another
            detector, or `save_best` names no width.
    """

    def __init__(self, other_heads: bool = False) -> None:
        self.other_heads = other_heads

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare names and shapes with the detector's, before any tensor is loaded."""
        content = checkpoint.get('state_dict', checkpoint)
        tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
        found = {name.removeprefix('module.'): tensor.shape for name, tensor in tensors.items()}
        wanted = {name: tensor.shape for name, tensor in unwrapped(runner.model).state_dict().items()}
        problems = mismatches(wanted, found)
        if self.other_heads and (heads := [problem for problem in problems if problem.startswith(_HEADS)]):
            print_log(f'Not taken from the checkpoint: {shorten(heads)}', 'current')
            problems = [problem for problem in problems if problem not in heads]
        if problems:
            raise InputError(f'the checkpoint is of another detector: {shorten(problems)}{_remedy(found)}')

    def before_train(self, runner: Runner) -> None:
        """Check that the folder holds no checkpoints, unless the run is resumed, and that `save_best` names a width."""
        if runner.iter == 0 and (Path(runner.work_dir) / 'last_checkpoint').exists():
            raise InputError(
                f'{runner.work_dir} holds the checkpoints of another run: add --resume to go on with it, or choose '
                'another folder with --work-dir'
            )
        saving = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook) and hook.save_best]
        for metric in chain.from_iterable(hook.key_indicators for hook in saving):
            if metric != 'auto' and not metric.startswith('width_'):
                raise InputError(f'save_best {metric!r} names no width; give one, such as width_1.00/{metric}')


@HOOKS.register_module()
class ClassesGuardHook(Hook):
    """Refuse heads for another number of classes than the images have: no index of a label would tell.

    Raises:
        InputError: `num_classes` of a head is not the number of classes in the `metainfo` of the data.
    """

    def before_train(self, runner: Runner) -> None:
        """Check the images of training and validation."""
        loops = (runner.train_loop, *([runner.val_loop] if runner.val_loop is not None else []))
        for loop in loops:
            _check_heads(runner.model, loop.dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        """Check the images of a test."""
        _check_heads(runner.model, runner.test_loop.dataloader.dataset)


def _check_heads(model: torch.nn.Module, dataset: Any) -> None:
    classes = dataset.metainfo.get('classes') or ()
    for name, module in unwrapped(model).named_modules():
        number = getattr(module, 'num_classes', None)
        if name.startswith(('backbone', 'rpn_head')) or not isinstance(number, int) or number == len(classes):
            continue
        raise InputError(
            f'the data have {len(classes)} classes ({shorten(classes)}), and model.{name}.num_classes is {number}; '
            f'give {len(classes)}, or the names of {number} classes as metainfo of each dataset'
        )


def _remedy(found: Container[str]) -> str:
    if 'backbone.conv1.weight' in found:
        return ". `slimclr-hub convert` converts a detector of the authors; one of MMDetection's own has one width"
    if 'backbone.network.conv1.weight' in found:
        return (
            '. Widths, classes and type of the detector must be those of the config that it was trained with; '
            'custom_hooks.1.other_heads=True leaves out the heads'
        )
    return '. Initial weights of the backbone go into model.backbone.weights'
