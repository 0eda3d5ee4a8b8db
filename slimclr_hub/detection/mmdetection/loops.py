"""Loops of mmengine that validate and test one width after the other."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.evaluator import Evaluator
from mmengine.registry import LOOPS
from mmengine.runner import BaseLoop, TestLoop, ValLoop

from slimclr_hub.detection.precision import width_name
from slimclr_hub.detection.widths import unwrapped
from slimclr_hub.errors import InputError
from slimclr_hub.models.widths import check_width


class WidthLoop(BaseLoop):
    """Evaluate several widths.

    Args:
        args: As in `ValLoop` and `TestLoop`.
        widths: Widths to evaluate; all that the network holds unless given.
        kwargs: As in `ValLoop` and `TestLoop`.

    Raises:
        InputError: The network does not hold one of them.
    """

    stage: str
    evaluator: Evaluator

    def __init__(self, *args: Any, widths: Sequence[float] | float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        detector = unwrapped(self.runner.model)
        if not hasattr(detector, 'set_width'):
            raise InputError(
                f'{type(detector).__name__} has no widths to evaluate; use a type such as SlimmableMaskRCNN'
            )
        # A single value on the command line comes as a number.
        several = [widths] if isinstance(widths, float | int) else widths
        held = detector.widths
        self.widths = held if several is None else tuple(check_width(width, held) for width in several)

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


_FILES: dict[str, Callable[[str, str], str]] = {
    'outfile_prefix': lambda prefix, name: f'{prefix}.{name}',  # of CocoMetric
    'out_file_path': lambda path, name: str(Path(path).with_suffix(f'.{name}{Path(path).suffix}')),  # of mim test --out
    'test_out_dir': lambda folder, name: str(Path(folder) / name),  # of mim test --show-dir
}


@LOOPS.register_module()
class SlimmableValLoop(WidthLoop, ValLoop):
    """Validate several widths; see `WidthLoop`."""

    stage = 'val'


@LOOPS.register_module()
class SlimmableTestLoop(WidthLoop, TestLoop):
    """Test several widths, or one of them by `--cfg-options test_cfg.widths=0.5`; see `WidthLoop`."""

    stage = 'test'
