"""How torch's loaders run their workers, and the loader of evaluation."""

import os
import signal
import threading
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from torch.utils.data import DataLoader, IterableDataset, Subset

from slimclr_hub.data.sources import DataConfig, make_dataset

_EVAL_BATCH = 128


def loader_options(config: DataConfig, seed: int) -> dict[str, Any]:
    """How torch's loader runs its workers."""
    return {
        'num_workers': config.num_workers,
        'persistent_workers': config.num_workers > 0,
        # Of their own, so that seeding workers draws nothing from the global one, which shuffles keys.
        'generator': torch.Generator().manual_seed(seed),
        'pin_memory': torch.cuda.is_available(),
        'worker_init_fn': leave_signals_to_the_trainer,
    }


def leave_signals_to_the_trainer(worker: int) -> None:
    """Let a worker outlive the signals that ask its process to stop, which needs batches until it has.

    A scheduler's signals, a launcher's and the keyboard's go to workers, too. SIGTERM is also how the process itself
    ends them, so that one counts where it comes from there.
    """
    for number in signal.SIGUSR1, signal.SIGINT:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # not on macOS, where a worker ends with the first SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        continue
    os._exit(0)


def eval_loader(config: DataConfig, split: str, at_most: int | None, seed: int, processes: int = 1) -> DataLoader:
    """Loader of (centre crop, label); where there are more images than `at_most`, a fixed random choice of them.

    A batch is that of all processes, for the caller to split.
    """
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
