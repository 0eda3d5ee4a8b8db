"""Milliseconds of a network by width, as this machine takes them, for `models.budget` to choose a width by."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from slimclr_hub.hub.export.checks import INPUT
from slimclr_hub.hub.export.onnx import export_onnx, open_session
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.budget import QueryTable, Setting, Timing, machine_of, versions_of
from slimclr_hub.models.mode import evaluating
from slimclr_hub.runs.progress import progress_bar
from slimclr_hub.runs.turns import in_turns, seconds_of
from slimclr_hub.settings import at_least

if TYPE_CHECKING:
    from rich.table import Table

Call = Callable[[], float]
"""Runs a batch, and returns the seconds that it took."""

_WARM_UP = 3


def measure(
    model: SlimmableResNet,
    settings: Sequence[Setting],
    repeats: int = 50,
    widths: Sequence[float] | None = None,
    progress: bool = True,
) -> QueryTable:
    """Time a batch at each width in each setting, all in turns, so that a drift of the machine's speed favours none.

    Args:
        model: The network, on the device of the settings; its mode and the threads of PyTorch come back afterwards.
        settings: How it runs.
        repeats: Repeats of each; a width is chosen by its slowest one.
        widths: The widths, all unless given.
        progress: Show a progress bar.

    Raises:
        InputError: A runtime is not installed, or `repeats` is below 1.
    """
    at_least('--repeats', repeats, 1)
    versions: dict[str, str] = {}
    for setting in settings:
        versions |= versions_of(setting.runtime)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.inference_mode())
        # OpenVINO leaves the thread that runs it with a stack for signals that is freed later, and the next signal that
        # Python handles there ends the process (2026.4): so that thread is not the main one, which handles signals.
        thread = stack.enter_context(ThreadPoolExecutor(1))
        calls = {
            (width, setting): _call(model, width, setting, Path(folder), thread)
            for setting in settings
            for width in widths or model.widths
        }
        images = sum(setting.batch_size for _, setting in calls) * (_WARM_UP + repeats)
        bar = stack.enter_context(progress_bar(images, 'timing', progress))

        def run(case: tuple[float, Setting]) -> float:
            torch.set_num_threads(case[1].threads)
            taken = calls[case]()
            bar.update(case[1].batch_size)
            return taken

        found = in_turns({case: partial(run, case) for case in calls}, _WARM_UP + repeats)
        seconds = {case: taken[_WARM_UP:] for case, taken in found.items()}
    timings = tuple(
        Timing(width, setting, 1000 * median(taken), 1000 * max(taken), repeats)
        for (width, setting), taken in seconds.items()
    )
    return QueryTable(machine_of(settings[0].device), versions, timings)


def timings_table(timings: Sequence[Timing]) -> 'Table':
    """Return a table for rich, a row for each width in each setting."""
    from rich.table import Table

    table = Table()
    for header in ('width', 'setting', 'median (ms)', 'slowest (ms)', 'images/s', 'repeats'):
        table.add_column(header, justify='left' if header == 'setting' else 'right')
    for timing in timings:
        speed = 1000 * timing.setting.batch_size / timing.median
        numbers = f'{timing.median:.3g}', f'{timing.slowest:.3g}', f'{speed:.3g}', str(timing.repeats)
        table.add_row(f'{timing.width:g}', str(timing.setting), *numbers)
    return table


def draw_timings(timings: Sequence[Timing], top1: Mapping[float, float], path: Path) -> None:
    """Draw accuracy, or the width where it is not known, over milliseconds, as `path`.png and `path`.pdf."""
    from slimclr_hub.runs.figures import line_style, marker, new_figure, save_figure

    figure, (axis,) = new_figure()
    known = all(timing.width in top1 for timing in timings)
    for number, setting in enumerate(dict.fromkeys(timing.setting for timing in timings)):
        points = [timing for timing in timings if timing.setting == setting]
        heights = [top1[timing.width] if known else timing.width for timing in points]
        axis.plot(
            [timing.median for timing in points],
            heights,
            marker=marker(number),
            label=str(setting),
            **line_style(number),
        )
    axis.set_xscale('log')
    axis.set_xlabel('milliseconds of a batch, median')
    axis.set_ylabel('top-1 accuracy (%)' if known else 'width')
    axis.legend(fontsize=7)
    save_figure(figure, path)


def _call(model: SlimmableResNet, width: float, setting: Setting, folder: Path, thread: Executor) -> Call:
    images = torch.randn(setting.batch_size, model.in_chans, setting.size, setting.size)
    if setting.runtime == 'torch':
        images = images.to(next(model.parameters()))
        return partial(seconds_of, partial(model.forward_at, images, width), device=images.device)
    path = folder / f'{width:g}-{setting.size}.onnx'
    if not path.exists():
        with model.set_width(width), torch.inference_mode(False):
            export_onnx(model, path, size=setting.size)
    if setting.runtime == 'onnxruntime':
        feed = {INPUT: images.numpy()}
        return partial(seconds_of, partial(open_session(path, setting.threads).run, None, feed))
    opened = thread.submit(_openvino, path, images.numpy(), setting.threads).result()
    return lambda: thread.submit(seconds_of, opened).result()


def _openvino(path: Path, images: Any, threads: int) -> Callable[[], object]:
    import openvino

    settings = {'INFERENCE_NUM_THREADS': threads, 'PERFORMANCE_HINT': 'LATENCY'}
    compiled = openvino.Core().compile_model(str(path), 'CPU', settings)
    return lambda: compiled([images])
