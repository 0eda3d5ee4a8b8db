"""k-NN whose labelled images are divided over the processes, so that none of them holds all.

Shapes: Q queries of this process, N labelled images of this process, D features.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, Subset

from slimclr_hub.data import DataConfig
from slimclr_hub.data.loaders import eval_loader, loader_options
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.knn import Neighbours, merge, nearest
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.runs.progress import progress_bar


def share_loader(
    config: DataConfig, split: str, at_most: int | None, seed: int, accelerator: Accelerator
) -> tuple[DataLoader, int]:
    """Loader of this process's share of a split, which no other process sees, and the images of all shares.

    Args:
        config: The images; `batch_size` is that of one process.
        split: Which of them.
        at_most: Images of all shares at most, a fixed random choice; of a stream all.
        seed: Seed of that choice.
        accelerator: The processes.

    Raises:
        InputError: There are no such images, or they are a stream, which does not divide.
    """
    loader = eval_loader(config, split, at_most, seed)
    dataset: Any = loader.dataset
    total = len(dataset)
    if accelerator.num_processes == 1:
        return loader, total
    if config.streams:
        raise InputError(f'data.name {config.name} is a stream, which does not divide; run it on one process')
    share = Subset(dataset, range(accelerator.process_index, total, accelerator.num_processes))
    return DataLoader(share, batch_size=loader.batch_size, **loader_options(config, seed)), total


@torch.inference_mode()
def share_features(
    accelerator: Accelerator, backbone: SlimmableResNet, loader: DataLoader, widths: Sequence[float], total: int
) -> tuple[dict[float, torch.Tensor], torch.Tensor]:
    """Features of this process's share at all widths, in one pass over its images.

    Args:
        accelerator: The processes.
        backbone: A network in eval mode, without a classifier.
        loader: (images, labels) of this process.
        widths: Widths to run.
        total: Images of all processes, for the bar that the main one shows.

    Returns:
        For each width features [N, D] of length 1, in float32 in main memory, and labels [N].
    """
    features: dict[float, list[torch.Tensor]] = {
        width: [torch.empty(0, _features_at(backbone, width))] for width in widths
    }
    labels = [torch.empty(0, dtype=torch.long)]
    with progress_bar(total, 'features', accelerator.is_main_process) as bar:
        for images, label in loader:
            with accelerator.autocast():
                outputs = backbone.forward_widths(images.to(accelerator.device, non_blocking=True), widths)
            for width, output in outputs.items():
                features[width].append(F.normalize(output.float(), dim=1).cpu())
            labels.append(label)
            # Other processes have come about as far.
            bar.update(min(len(label) * accelerator.num_processes, total - bar.n))
    return {width: torch.cat(parts) for width, parts in features.items()}, torch.cat(labels)


def neighbours_in_all(
    accelerator: Accelerator, queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, k: int, chunk: int
) -> Iterator[Neighbours]:
    """The nearest neighbours of this process's queries among the labelled images of all processes.

    Queries go round in chunks: each process searches its own share for those of all, and the candidates are exchanged
    and merged. All processes have to come to the end of this together.

    Args:
        accelerator: The processes.
        queries: Features [Q, D] of length 1.
        bank: Features of this process's share [N, D] of length 1, on the device.
        labels: Their classes [N], on the device.
        k: Neighbours, no more than there are labelled images on all processes.
        chunk: Queries of all processes at a time.

    Yields:
        Neighbours of the next queries [q, k] on the device, in their order; in the last chunks q may be 0.
    """
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    own = -(-chunk // world)
    longest = int(accelerator.gather(torch.tensor([len(queries)], device=device)).max())
    for start in range(0, longest, own):
        mine = queries[start : start + own].to(device)
        # What is gathered has to have one shape everywhere; the filling is dropped again.
        everyone = accelerator.gather(F.pad(mine, (0, 0, 0, own - len(mine))))
        found = nearest(everyone, bank, labels, k)
        missing = k - found.similarity.shape[1]
        similarity = accelerator.gather(F.pad(found.similarity, (0, missing), value=-torch.inf))
        classes = accelerator.gather(F.pad(found.labels, (0, missing)))
        candidates = [
            Neighbours(*(tensor[other + rank * own :][: len(mine)] for tensor in (similarity, classes)))
            for other in range(0, world * len(everyone), len(everyone))
        ]
        yield merge(candidates, k)


def _features_at(backbone: SlimmableResNet, width: float) -> int:
    with backbone.set_width(width):
        return backbone.num_features
