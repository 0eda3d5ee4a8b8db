"""Validation and test of every width in turn."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mmengine.evaluator import Evaluator
from mmengine.model import is_model_wrapper
from mmengine.registry import LOOPS
from mmengine.runner import BaseLoop, TestLoop, ValLoop

from slimclr_hub.detection.mmdetection.names import width_name
from slimclr_hub.detection.mmdetection.widths import Slimmable
from slimclr_hub.errors import InputError
from slimclr_hub.models.widths import check_width


class _WidthLoop(BaseLoop):
    stage: str
    evaluator: Evaluator
    asked: Sequence[float] | None

    def run(self) -> dict[str, Any]:
        """Evaluate the widths one after the other.

        Returns:
            `width_0.50/coco/bbox_mAP` and so on, of every width.
        """
        detector = _detector(self.runner.model)
        widths = _checked(self.asked, detector)
        self.runner.call_hook(f'before_{self.stage}')
        self.runner.call_hook(f'before_{self.stage}_epoch')
        self.runner.model.eval()
        metrics = {}
        for width in widths:
            self.runner.logger.info(f'{self.stage} at width {width:g}')
            with detector.set_width(width), _own_files(self.evaluator, width):
                for i, batch in enumerate(self.dataloader):
                    self.run_iter(i, batch)
                found = self.evaluator.evaluate(len(self.dataloader.dataset))
            metrics.update({f'{width_name(width)}/{key}': value for key, value in found.items()})
        # Once, with all of them: hooks log them, and choose the best checkpoint by one.
        self.runner.call_hook(f'after_{self.stage}_epoch', metrics=metrics)
        self.runner.call_hook(f'after_{self.stage}')
        return metrics


@LOOPS.register_module()
class SlimmableValLoop(_WidthLoop, ValLoop):
    """Validation of several widths.

    Args:
        args: As in `ValLoop`.
        widths: The widths; all of the network's unless given.
        kwargs: As in `ValLoop`.

    Raises:
        InputError: The network does not hold one of them.
    """

    stage = 'val'

    def __init__(self, *args: Any, widths: Sequence[float] | float | None = None, **kwargs: Any) -> None:
        self.asked = _several(widths)
        super().__init__(*args, **kwargs)
        _checked(self.asked, _detector(self.runner.model))  # now, not after the first epoch


@LOOPS.register_module()
class SlimmableTestLoop(_WidthLoop, TestLoop):
    """Test of several widths; one of them by `--cfg-options test_cfg.widths=0.5`.

    Args:
        args: As in `TestLoop`.
        widths: The widths; all of the network's unless given.
        kwargs: As in `TestLoop`.

    Raises:
        InputError: The network does not hold one of them.
    """

    stage = 'test'

    def __init__(self, *args: Any, widths: Sequence[float] | float | None = None, **kwargs: Any) -> None:
        self.asked = _several(widths)
        super().__init__(*args, **kwargs)
        _checked(self.asked, _detector(self.runner.model))


def _several(widths: Sequence[float] | float | None) -> Sequence[float] | None:
    # A single value on the command line comes as a number.
    return [widths] if isinstance(widths, float | int) else widths


def _detector(model: Any) -> Slimmable:
    detector = model.module if is_model_wrapper(model) else model
    if not hasattr(detector, 'set_width'):
        raise InputError(
            f'{type(detector).__name__} has no widths to evaluate; its type has to be one such as SlimmableMaskRCNN'
        )
    return detector


def _checked(asked: Sequence[float] | None, detector: Slimmable) -> tuple[float, ...]:
    return detector.widths if asked is None else tuple(check_width(width, detector.widths) for width in asked)


@contextmanager
def _own_files(evaluator: Evaluator, width: float) -> Iterator[None]:
    # Or each width would write its predictions over those of the one before.
    before = {metric: prefix for metric in evaluator.metrics if (prefix := getattr(metric, 'outfile_prefix', None))}
    for metric, prefix in before.items():
        metric.outfile_prefix = f'{prefix}.{width_name(width)}'
    try:
        yield
    finally:
        for metric, prefix in before.items():
            metric.outfile_prefix = prefix
