"""One pass of a network over a list of images, with the preprocessing of its configuration."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import create_transform, resolve_input_data_config
from timm.layers import get_device_dtype
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate

from slimclr_hub.errors import InputError
from slimclr_hub.images import CentreFirst, Problem, reason
from slimclr_hub.inference.images import ImageList, Sources, find_unreadable, list_images, unreadable_error
from slimclr_hub.models.mode import evaluating
from slimclr_hub.runs.progress import progress_bar
from slimclr_hub.settings import at_least, one_of

PRECISIONS = {'no': None, 'fp16': torch.float16, 'bf16': torch.bfloat16}
_MODES = {1: 'L', 3: 'RGB'}
_WORKERS_AT_MOST = 8

Forward = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
_Batch = tuple[list[int], torch.Tensor | None, dict[int, str]]


@dataclass(frozen=True)
class InferenceConfig:
    """Options of a pass over images, which `embed` explains."""

    batch_size: int = 64
    workers: int | None = None
    precision: str = 'no'
    skip_unreadable: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        at_least('--batch-size', self.batch_size, 1)
        at_least('--workers', self.workers or 0, 0)
        one_of('--precision', self.precision, PRECISIONS)


class Outputs(NamedTuple):
    """Names of the images that were read, outputs of the network with a row for each, and the unreadable images."""

    names: list[str]
    tensors: tuple[torch.Tensor, ...]
    skipped: list[Problem]


def run_images(
    model: nn.Module, images: Sources, forward: Forward, config: InferenceConfig, description: str
) -> Outputs:
    """Run a network in eval mode over images, on its device and in its dtype; its mode is restored.

    `forward` maps a batch [B, C, H, W] to tensors of B rows; `description` stands at the progress bar.

    Raises:
        InputError: Images do not exist or cannot be read, the network has no preprocessing, or the batch does not fit
            in memory.
    """
    transform, mode = preprocessing(model)
    listed = list_images(images)
    problems = find_unreadable(listed, config.progress)
    skipped = [(listed.names[index], why) for index, why in problems.items()]
    if skipped and (not config.skip_unreadable or len(skipped) == len(listed)):
        raise unreadable_error(skipped)
    listed = listed.without(problems) if skipped else listed
    device, dtype = get_device_dtype(model).values()
    names: list[str] = []
    tensors: list[torch.Tensor] = []
    loader = _loader(listed, transform, mode, config, device)
    with evaluating(model), progress_bar(len(listed), description, config.progress) as bar:
        for indices, batch, failed in loader:
            skipped += [(listed.names[index], why) for index, why in failed.items()]
            if failed and not config.skip_unreadable:
                raise unreadable_error(skipped)
            if batch is not None:
                outputs = _forward(forward, batch.to(device, dtype, non_blocking=True), config)
                # Made outside of inference mode, so that a classifier may be trained on them.
                tensors = tensors or [torch.empty(len(listed), *out.shape[1:], dtype=out.dtype) for out in outputs]
                for tensor, output in zip(tensors, outputs, strict=True):
                    tensor[len(names) : len(names) + len(indices)] = output
                names += [listed.names[index] for index in indices]
            bar.update(len(indices) + len(failed))
    if not names:
        raise unreadable_error(skipped)
    if skipped:
        lines = [f'  {name}: {why}' for name, why in skipped]
        print(f'Left out {len(skipped)} that could not be read:', *lines, sep='\n', file=sys.stderr)
    return Outputs(names, tuple(tensor[: len(names)] for tensor in tensors), skipped)


def preprocessing(model: nn.Module) -> tuple[Callable[[Image.Image], torch.Tensor], str]:
    """Return timm's evaluation transform for a network, and Pillow's mode of its images.

    Raises:
        InputError: The network has no preprocessing configuration, or takes neither RGB nor grey images.
    """
    if not getattr(model, 'pretrained_cfg', None):
        raise InputError(
            'the network does not say how images are preprocessed: it has no pretrained_cfg; take it from '
            'timm.create_model, or give it that of the network it was made from'
        )
    data = resolve_input_data_config(model)
    channels = data['input_size'][0]
    if channels not in _MODES:
        raise InputError(f'the network takes {channels} channels; images are read as grey (1) or RGB (3) alone')
    transform = create_transform(**data, is_training=False)
    # Other modes of cropping resize the image as a whole to the network's size.
    return CentreFirst(transform) if data['crop_mode'] == 'center' else transform, _MODES[channels]


def _forward(forward: Forward, batch: torch.Tensor, config: InferenceConfig) -> tuple[torch.Tensor, ...]:
    dtype = PRECISIONS[config.precision]
    try:
        with torch.inference_mode(), torch.autocast(batch.device.type, dtype, enabled=dtype is not None):
            return forward(batch)
    except torch.OutOfMemoryError as error:
        raise InputError(f'--batch-size {config.batch_size} is too large for {batch.device}; halve it') from error


@dataclass(eq=False)
class _Decoded(Dataset[tuple[int, torch.Tensor | None, str | None]]):
    # An error is returned as a value: a worker would wrap it into a traceback, and lose its batch.
    images: ImageList
    transform: Callable[[Image.Image], torch.Tensor]
    mode: str

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor | None, str | None]:
        try:
            return index, self.transform(self.images.read(index, self.mode)), None
        except Exception as error:  # as in `find_unreadable`; a MemoryError, too
            return index, None, reason(error)


def _collate(samples: Sequence[tuple[int, torch.Tensor | None, str | None]]) -> _Batch:
    read = {index: tensor for index, tensor, _ in samples if tensor is not None}
    failed = {index: why for index, _, why in samples if why is not None}
    return list(read), default_collate(list(read.values())) if read else None, failed


def _loader(
    images: ImageList, transform: Any, mode: str, config: InferenceConfig, device: torch.device
) -> DataLoader[_Batch]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    workers = min(cores, _WORKERS_AT_MOST) if config.workers is None else config.workers
    return DataLoader(
        _Decoded(images, transform, mode),  # type: ignore[arg-type]
        batch_size=config.batch_size,
        num_workers=workers if len(images) > config.batch_size else 0,
        collate_fn=_collate,
        pin_memory=device.type == 'cuda',
        generator=torch.Generator(),  # of its own, to leave the global one as it was
    )
