"""Pre-training with its evaluation: what `recipes/pretrain.py` runs."""

from pathlib import Path

from accelerate import PartialState

from slimclr_hub.runs.command_line import run_script
from slimclr_hub.train.online import online_evaluation
from slimclr_hub.train.parse import parse_pretrain
from slimclr_hub.train.report import compare_with_itself, draw_figure
from slimclr_hub.train.trainer import ObserverFactory, pretrain


def main(default: Path, make_observer: ObserverFactory | None = None) -> None:
    """Read the command line, train, and end with a table and a figure.

    Args:
        default: Recipe that applies where the command line names none.
        make_observer: What to record of gradients and weights; nothing unless given.
    """
    run_script(lambda: _pretrain(default, make_observer))


def _pretrain(default: Path, make_observer: ObserverFactory | None) -> None:
    result = pretrain(parse_pretrain(default), online_evaluation, make_observer)
    if PartialState().is_main_process:
        draw_figure(result.metrics, [fact.width for fact in result.facts], result.folder / 'training')
        figures = [result.folder / 'training', *compare_with_itself(result.folder)]
        narrowest = result.facts[-1].width
        print(
            f'Figures: {", ".join(f"{figure}.png" for figure in figures)}\n'
            f"Open it: timm.create_model('local-dir:{result.folder}', pretrained=True, width={narrowest})"
        )
