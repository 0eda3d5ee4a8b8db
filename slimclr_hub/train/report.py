"""What a finished run leaves: the network with its card, a table by width, figures."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from slimclr_hub.distributed import average_batchnorm
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.compare.entries import measure_speed, read_entries
from slimclr_hub.evaluate.compare.figure import draw_pareto
from slimclr_hub.evaluate.compare.tables import comparison_tables
from slimclr_hub.hub.card import training_card
from slimclr_hub.hub.folder import save_folder
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.cost import width_facts
from slimclr_hub.runs.figures import line_style, mark_baseline, mark_slow_start, new_figure, save_figure
from slimclr_hub.runs.result import RAW_PIXELS, RAW_PIXELS_KEY, environment, save, training_results
from slimclr_hub.settings import to_dict
from slimclr_hub.train.config import PretrainConfig
from slimclr_hub.train.run_folder import RunFolder

_BATCH = 32
_SECONDS = 1.5
_PANELS = {
    'info_nce': 'InfoNCE loss (nats)',
    'cross_entropy': 'cross-entropy (nats)',
    'knn': 'k-NN accuracy (%)',
    'linear': 'accuracy of a linear classifier (%)',
    'top1': 'top-1 accuracy (%)',
    'rank': 'effective rank of features',
}


def write_result(
    config: PretrainConfig, backbone: SlimmableResNet, folder: RunFolder, accelerator: Accelerator
) -> None:
    """Write the network of a finished run, its results, its card and the figure of its training into its folder."""
    average_batchnorm(backbone)
    if accelerator.is_main_process:
        metrics, data = folder.read_metrics(), config.data
        facts: dict[str, Any] = next((record for record in reversed(metrics) if record['kind'] == 'eval'), {})
        measured = training_results(
            metrics, to_dict(config), str(folder.path), k=facts.get('k'), images=facts.get('images')
        )
        results = [replace(result, environment=environment()) for result in measured]
        about = {
            'name': folder.path.name,
            'folder': str(folder.path),
            'architecture': config.model.name,
            'method': config.method.name,
            'data': data.name,
            'epochs': str(config.optim.epochs),
            'size': str(data.size),
        }
        card = training_card(width_facts(backbone, data.size), about, results)
        save_folder(backbone, folder.path, **data.look, card=card)
        if results:
            save(results, folder.path)
        draw_figure(metrics, backbone.widths, folder.path / 'training', config.slow_start)
    accelerator.wait_for_everyone()


def compare_with_itself(folder: Path) -> list[Path]:
    """Print the comparison of a run with itself before training, and draw it: cost, speed and accuracy by width.

    Returns:
        The figure's path without suffix, if there was an accuracy to draw.
    """
    entries = read_entries([str(folder)])
    # Training may still hold the memory; a run that is done does not fail for its speed.
    with suppress(InputError):
        entries = measure_speed(entries, _BATCH, _SECONDS)
    for table in comparison_tables(entries, _BATCH, environment()['hardware']):
        table.print()
    return [folder / 'pareto'] if draw_pareto(entries, folder / 'pareto') else []


def draw_figure(metrics: Sequence[dict[str, Any]], widths: Sequence[float], path: Path, slow_start: float = 0) -> None:
    """Draw the loss of each width, the measured accuracies and the rank over epochs into `path`.png and .pdf.

    `metrics` are the lines of metrics.jsonl. The epoch at which slow start ends is marked.
    """
    kinds = {kind: [record for record in metrics if record['kind'] == kind] for kind in ('train', 'eval')}
    steps_per_epoch = kinds['train'][-1]['step'] / kinds['train'][-1]['epoch']
    panels = [
        (kind, name)
        for name in _PANELS
        for kind, records in kinds.items()
        if any(f'{name}/{widths[0]:g}' in record for record in records)
    ]
    figure, axes = new_figure(len(panels))
    for axis, (kind, name) in zip(axes, panels, strict=True):
        for i, width in enumerate(widths):
            key = f'{name}/{width:g}'
            points = [(record['step'] / steps_per_epoch, record[key]) for record in kinds[kind] if key in record]
            axis.plot(
                *zip(*points, strict=True),
                label=f'width {width:g}',
                marker='o' if kind == 'eval' else None,
                **line_style(i),
            )
        for record in kinds[kind]:
            if (top1 := record.get(f'{RAW_PIXELS_KEY}/{name}')) is not None:
                mark_baseline(axis, RAW_PIXELS, top1)
        mark_slow_start(axis, slow_start if len(widths) > 1 else 0)
        axis.set_xlabel('epoch')
        axis.set_ylabel(_PANELS[name])
        axis.legend()
    save_figure(figure, path)
