"""Loaders: options of torch's workers, the evaluation loader, and copies to the device."""

import multiprocessing.queues
import os
import signal
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from torch.utils.data import DataLoader, IterableDataset, Subset

from slimclr_hub.data.config import DataConfig
from slimclr_hub.data.sources import make_dataset

_EVAL_BATCH = 128


def loader_options(config: DataConfig, seed: int) -> dict[str, Any]:
    """Return arguments of torch's loader that decide how its workers run."""
    return {
        'num_workers': config.num_workers,
        'persistent_workers': config.num_workers > 0,
        # Of their own, so that seeding workers draws nothing from the global one, which shuffles keys.
        'generator': torch.Generator().manual_seed(seed),
        'pin_memory': torch.cuda.is_available(),
        'worker_init_fn': prepare_worker,
    }


def prepare_worker(worker: int) -> None:
    """Ignore signals that ask the training process to stop, and end where a batch cannot be handed over to it.

    It needs batches until it has stopped. Signals of a scheduler, a launcher, a terminal and the keyboard reach
    workers, too. SIGTERM is obeyed if that process sends it. A batch that finds no room in the shared memory would be
    lost otherwise, and waited for without an end.
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_without_room)  # type: ignore[attr-defined]
    for number in signal.SIGUSR1, signal.SIGINT, signal.SIGHUP:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # not on macOS, where a worker ends with the first SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_without_room(error: Exception, batch: Any) -> None:
    os._exit(os.EX_IOERR)


def _end_with(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        continue
    os._exit(0)


def eval_loader(config: DataConfig, split: str, at_most: int | None, seed: int, processes: int = 1) -> DataLoader:
    """Load (centre crop, label) in batches of all processes; of more images than `at_most`, a fixed random choice."""
    dataset = make_dataset(config, split, training=False)
    dataset.transform = create_transform(  # type: ignore[attr-defined]
        (config.channels, config.size, config.size),
        mean=config.mean,
        std=config.std,
        crop_pct=config.crop_pct,
        interpolation='bilinear',
    )
    length = len(dataset)  # type: ignore[arg-type]
    if at_most is not None and length > at_most and not isinstance(dataset, IterableDataset):
        chosen = np.random.default_rng(seed).permutation(length)[:at_most]
        dataset = Subset(dataset, np.sort(chosen).tolist())
    return DataLoader(
        dataset, batch_size=min(config.batch_size // processes, _EVAL_BATCH) * processes, **loader_options(config, seed)
    )


class ToDevice:
    """Copy tensors to a device asynchronously, on a CUDA stream that does not wait for the step before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == 'cuda' else None

    def __call__(self, tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the tensors on the device, ready for kernels queued from here on; copies of pageable memory block."""
        if self.stream is None:
            return self._copies(tensors)
        with torch.cuda.stream(self.stream):
            placed = self._copies(tensors)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        for tensor in placed:
            # Their memory is of the copying stream, which would write the next batch to it once they are dropped.
            tensor.record_stream(current)
        return placed

    def _copies(self, tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)
