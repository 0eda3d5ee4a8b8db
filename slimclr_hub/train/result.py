"""What a finished run leaves in its folder: the network, and what it has reached."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from accelerate import Accelerator

from slimclr_hub.distributed import average_batchnorm
from slimclr_hub.hub.card import training_card
from slimclr_hub.hub.folder import save_folder
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.cost import WidthFacts, width_facts
from slimclr_hub.train.config import PretrainConfig
from slimclr_hub.train.run_folder import RunFolder


def write_result(
    config: PretrainConfig, backbone: SlimmableResNet, folder: RunFolder, accelerator: Accelerator
) -> tuple[list[WidthFacts], list[dict[str, Any]]]:
    """Write the network of a finished run, with its card, into the run's folder.

    Returns:
        Cost and accuracy of each width, and the lines of metrics.jsonl.
    """
    average_batchnorm(backbone)
    metrics = folder.read_metrics()
    facts = measured_facts(backbone, config.data.size, metrics)
    about = {
        'name': folder.path.name,
        'folder': str(folder.path),
        'architecture': config.model.name,
        'method': config.method.name,
        'data': config.data.name,
        'epochs': str(config.optim.epochs),
        'size': str(config.data.size),
    }
    if accelerator.is_main_process:
        save_folder(
            backbone,
            folder.path,
            size=config.data.size,
            mean=config.data.mean,
            std=config.data.std,
            crop_pct=config.data.crop_pct,
            card=training_card(facts, about),
        )
    accelerator.wait_for_everyone()
    return facts, metrics


def measured_facts(backbone: SlimmableResNet, size: int, metrics: Iterable[dict[str, Any]]) -> list[WidthFacts]:
    """Cost of each width, and its accuracies in the first and the last evaluation of a run's metrics."""
    evaluations = [record for record in metrics if record['kind'] == 'eval']
    facts = width_facts(backbone, size)
    if not evaluations:
        return facts
    first, last = evaluations[0], evaluations[-1]
    return [
        replace(
            fact,
            start=first.get(f'knn/{fact.width:g}'),
            end=last.get(f'knn/{fact.width:g}'),
            linear=last.get(f'linear/{fact.width:g}'),
            top1=last.get(f'top1/{fact.width:g}'),
        )
        for fact in facts
    ]
