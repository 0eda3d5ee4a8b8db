"""Features of a data set at several widths, in one pass over the images."""

from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator

from slimclr_hub.models import SlimmableResNet


@torch.inference_mode()
def extract_features(
    accelerator: Accelerator, backbone: SlimmableResNet, loader: Iterable, widths: Sequence[float]
) -> tuple[dict[float, torch.Tensor], torch.Tensor]:
    """Pooled features and labels, gathered from all processes.

    Args:
        accelerator: The processes.
        backbone: A network in eval mode, without a classifier.
        loader: (images, labels), prepared by `accelerator`.
        widths: Widths to run.

    Returns:
        For each width float32 features [N, C * width], and labels [N], on the device.
    """
    features: dict[float, list[torch.Tensor]] = {width: [] for width in widths}
    labels = []
    for images, label in loader:
        with accelerator.autocast():
            outputs = backbone.forward_widths(images, widths)
        gathered = accelerator.gather_for_metrics((*[output.float() for output in outputs.values()], label))
        for width, output in zip(widths, gathered[:-1], strict=True):
            features[width].append(output)
        labels.append(gathered[-1])
    return {width: torch.cat(parts) for width, parts in features.items()}, torch.cat(labels)
