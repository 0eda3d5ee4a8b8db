"""The width that fits a budget: milliseconds that were measured on this machine, memory, or multiply-adds.

Milliseconds come from a query table, which `slimclr-hub latency` measures and keeps in huggingface_hub's cache of
assets. Yang et al. 2020, MutualNet (https://arxiv.org/abs/1909.12978), choose width and resolution in this way; here
the resolution is the network's own, unless it has `slimclr_hub.models.resolutions`.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import cached_assets_path

from slimclr_hub.errors import InputError
from slimclr_hub.files import write_text
from slimclr_hub.images import MAX_IMAGE_SIZE
from slimclr_hub.machine import processors
from slimclr_hub.models.cost import WidthNeeds, describe
from slimclr_hub.models.resolutions import Pair, Resolutions
from slimclr_hub.models.widths import check_width
from slimclr_hub.settings import Count, at_least, at_most
from slimclr_hub.text import first_line, human
from slimclr_hub.version import __version__
from slimclr_hub.weights.bounded import as_float, read_json

if TYPE_CHECKING:
    from slimclr_hub.models.slimmable_resnet import SlimmableResNet

RUNTIMES = ('torch', 'onnxruntime', 'openvino')


@dataclass(frozen=True)
class Budget:
    """What an inference may need; None for no limit.

    Args:
        max_ms: Milliseconds of a batch.
        max_mib: MiB of the width's tensors.
        max_macs: Multiply-adds of an image.

    Raises:
        InputError: A limit is not positive.
    """

    max_ms: float | None = None
    max_mib: float | None = None
    max_macs: float | None = None

    def __post_init__(self) -> None:
        for name, limit in asdict(self).items():
            if limit is not None and not (isinstance(limit, int | float) and limit > 0):
                raise InputError(f'{name} {limit!r} is not above 0')

    def __bool__(self) -> bool:
        return any(limit is not None for limit in asdict(self).values())


@dataclass(frozen=True)
class Setting:
    """How a network runs.

    Args:
        size: Height and width of the images in pixels.
        batch_size: Images of a batch.
        threads: Threads of the CPU.
        runtime: One of `RUNTIMES`.
        device: Of PyTorch, such as `cuda:1`, of which the type is kept; other runtimes than torch run on `cpu`.
    """

    size: Count
    batch_size: Count = 1
    threads: Count = field(default_factory=torch.get_num_threads)
    runtime: str = 'torch'
    device: str = 'cpu'

    def __post_init__(self) -> None:
        for name in 'size', 'batch_size', 'threads':
            at_least(name, getattr(self, name), 1)
        at_most('size', self.size, MAX_IMAGE_SIZE)
        if self.runtime not in RUNTIMES:
            raise InputError(f'runtime {self.runtime!r:.60} is not one of {", ".join(RUNTIMES)}')
        try:
            object.__setattr__(self, 'device', torch.device(self.device).type)
        except RuntimeError as error:
            raise InputError(f'device {self.device!r:.60} is none of PyTorch: {first_line(error)}') from error
        if self.runtime != 'torch' and self.device != 'cpu':
            raise InputError(f'device {self.device!r:.60}: {self.runtime} is measured on the cpu')

    def __str__(self) -> str:
        where = '' if self.device == 'cpu' else f' on {self.device}'
        images = f'batches of {self.batch_size} at {self.size}x{self.size}'
        return f'{images}, {self.runtime}{where}, threads: {self.threads}'


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a batch at one width.

    Args:
        width: The width.
        setting: How it ran.
        median: Median over the repeats.
        slowest: The slowest repeat, by which a width is chosen: of n repeats, another one is slower once in n + 1.
        repeats: Number of repeats.
    """

    width: float
    setting: Setting
    median: float
    slowest: float
    repeats: int

    def __post_init__(self) -> None:
        at_least('repeats', self.repeats, 1)
        if not 0 < self.median <= self.slowest < float('inf'):
            raise InputError(f'{self.median} ms in the median and {self.slowest} ms at most are no times')


@dataclass(frozen=True)
class QueryTable:
    """Timings of a network of one architecture, on one machine.

    Args:
        machine: `machine_of` the device.
        versions: Package -> its version.
        timings: One for each width and setting.
    """

    machine: str
    versions: Mapping[str, str]
    timings: tuple[Timing, ...]

    def with_timings(self, newer: 'QueryTable') -> 'QueryTable':
        """Both tables' timings, the newer ones of what both have; the newer's alone if machine or versions differ."""
        shared = self.versions.keys() & newer.versions.keys()
        if self.machine != newer.machine or any(self.versions[name] != newer.versions[name] for name in shared):
            return newer
        kept = {(timing.width, timing.setting): timing for timing in (*self.timings, *newer.timings)}
        return QueryTable(newer.machine, {**self.versions, **newer.versions}, tuple(kept.values()))

    def slowest(self, setting: Setting) -> dict[float, float]:
        """Width -> milliseconds of the slowest repeat."""
        return {timing.width: timing.slowest for timing in self.timings if timing.setting == setting}

    def save(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        write_text(path, json.dumps(asdict(self), indent=1) + '\n')


@dataclass(frozen=True)
class Choice:
    """The best pair of width and size within a budget.

    Args:
        width: The width.
        size: Height and width of the images in pixels.
        why: What it needs, and what the next better one does.
        needs: What each pair needs, the best first.
    """

    width: float
    size: int
    why: str
    needs: dict[Pair, WidthNeeds]


def table_path(model: 'SlimmableResNet') -> Path:
    """Where the query table of networks like this one is: the same architecture, channels of images and classes."""
    name = model.pretrained_cfg['architecture']
    return cached_assets_path('slimclr_hub', 'latency') / f'{name}-{model.in_chans}-{model.num_classes}.json'


def machine_of(device: str) -> str:
    """Name of the machine that a device is of."""
    gpu = f', {torch.cuda.get_device_name()}' if device == 'cuda' and torch.cuda.is_available() else ''
    return f'{processors()}{gpu}, {platform.system()}'


def versions_of(runtime: str) -> dict[str, str]:
    """Versions that times with a runtime depend on.

    Raises:
        InputError: It is not installed.
    """
    try:
        found = str(torch.__version__) if runtime == 'torch' else version(runtime)  # with its build
        return {'slimclr_hub': __version__, runtime: found}
    except PackageNotFoundError:
        extra = 'openvino' if runtime == 'openvino' else 'export'
        raise InputError(f'{runtime} is not installed: pip install "slimclr-hub[{extra}]"') from None


def read_table(path: Path) -> QueryTable:
    """Read what `QueryTable.save` wrote.

    Raises:
        InputError: It is longer than 1 MiB or something else.
        FileNotFoundError: It is not there.
    """
    try:
        content = read_json(path)
        timings = tuple(
            Timing(
                as_float(each['width']),
                Setting(**each['setting']),
                as_float(each['median']),
                as_float(each['slowest']),
                each['repeats'],
            )
            for each in content['timings']
        )
        machine, versions = content['machine'], content['versions']
        if not isinstance(machine, str) or not all(isinstance(text, str) for text in (*versions, *versions.values())):
            raise TypeError
        return QueryTable(machine, versions, timings)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise InputError(f'{path} is no table of times; remove it, and measure again: slimclr-hub latency') from error


def choose(
    model: 'SlimmableResNet', budget: Budget, setting: Setting, resolutions: Resolutions | None = None
) -> Choice:
    """Choose the widest width that fits, or the pair of width and size that was measured to be the most accurate.

    Args:
        model: The network, which may be on the meta device.
        budget: Limits.
        setting: How it is going to run, for `max_ms`; its size also counts for `max_macs`.
        resolutions: Pairs to choose from instead, if their accuracies are known; of equal ones, the cheapest.

    Raises:
        InputError: No width fits; or there are no times of this machine, versions, widths and setting.
    """
    pairs = () if resolutions is None else resolutions.pairs
    if not pairs or any(pair.accuracy is None for pair in pairs):
        pairs = tuple(Pair(width, setting.size) for width in model.widths)  # the widest first
    sizes = sorted({pair.size for pair in pairs})
    at = {(each.width, size): each for size in sizes for each in describe(model, size)}
    needs = {pair: at[check_width(pair.width, model.widths), pair.size] for pair in pairs}
    if pairs[0].accuracy is not None:
        needs = dict(sorted(needs.items(), key=lambda item: (-(item[0].accuracy or 0), item[1].multiply_adds)))
    times = None if budget.max_ms is None else _times(model, [replace(setting, size=size) for size in sizes])
    beyond = ''
    for pair, each in needs.items():
        ms = None if times is None else times[each.width, pair.size]
        words, problems = _judged(each, ms, budget)
        if not problems:
            return Choice(each.width, pair.size, f'{pair} needs {", ".join(words)}{beyond}', needs)
        beyond = f'; {pair} would need {", ".join(problems)}'
    raise InputError(f'no width fits {_in_words(budget)}{beyond}')


def _times(model: 'SlimmableResNet', settings: Sequence[Setting]) -> dict[tuple[float, int], float]:
    """(width, size) -> milliseconds, of settings that differ in the size."""
    setting = settings[0]
    command = (
        f'slimclr-hub latency NETWORK {" ".join(f"--size {each.size}" for each in settings)} '
        f'--batch-size {setting.batch_size} --threads {setting.threads} --runtime {setting.runtime} '
        f'--device {setting.device}'
    )
    path = table_path(model)
    try:
        table = read_table(path)
    except FileNotFoundError:
        raise InputError(f'max_ms: nothing was measured on this machine yet; measure first: {command}') from None
    if table.machine != machine_of(setting.device):
        raise InputError(f'max_ms: {path} is of {table.machine}, not of {machine_of(setting.device)}; {command}')
    for name, installed in versions_of(setting.runtime).items():
        if table.versions.get(name, installed) != installed:
            raise InputError(f'max_ms: {path} is of {name} {table.versions[name]}, not {installed}; again: {command}')
    found: dict[tuple[float, int], float] = {}
    for setting in settings:
        times = table.slowest(setting)
        if missing := [f'{width:g}' for width in model.widths if width not in times]:
            raise InputError(f'max_ms: nothing was measured at widths {", ".join(missing)} with {setting}; {command}')
        found |= {(width, setting.size): ms for width, ms in times.items()}
    return found


def _judged(needs: WidthNeeds, ms: float | None, budget: Budget) -> tuple[Sequence[str], Sequence[str]]:
    """What a width needs of what is limited, and the part of it that is too much."""
    found: list[tuple[float, float | None, str]] = [
        (needs.mib, budget.max_mib, f'{needs.mib:.2f} MiB'),
        (needs.multiply_adds, budget.max_macs, f'{human(needs.multiply_adds)} multiply-adds'),
    ]
    if ms is not None:
        found.append((ms, budget.max_ms, f'{ms:.3g} ms'))
    limited = [(need, limit, words) for need, limit, words in found if limit is not None]
    return [words for *_, words in limited], [words for need, limit, words in limited if need > limit]


def _in_words(budget: Budget) -> str:
    return ', '.join(f'{name}={limit:g}' for name, limit in asdict(budget).items() if limit is not None)
