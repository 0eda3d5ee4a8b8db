"""Pre-training with its evaluation: what `recipes/pretrain.py` runs."""

import sys
from pathlib import Path

from accelerate import PartialState

from slimclr_hub.errors import DataError, DivergedError, InputError, PreemptedError
from slimclr_hub.evaluate.online import online_evaluation
from slimclr_hub.evaluate.report import draw_figure, print_table
from slimclr_hub.train.loop import pretrain
from slimclr_hub.train.parse import parse_pretrain


def main(default: Path) -> None:
    """Read the command line, train, and end with a table and a figure.

    What a user can put right ends in one line on standard error and exit status 2, without a traceback. A run that was
    asked to stop, and has kept its state, ends with 75, or 130 from the keyboard.

    Args:
        default: Recipe that applies where the command line names none.
    """
    try:
        result = pretrain(parse_pretrain(default), online_evaluation)
    except (InputError, DataError, DivergedError, PreemptedError) as error:
        state = PartialState()
        # All processes meet the same mistake or signal, but each reads its own images.
        if state.is_main_process or isinstance(error, DataError):
            print(f'error: {error}', file=sys.stderr)
        if not isinstance(error, DataError):
            state.destroy_process_group()
        sys.exit(error.status if isinstance(error, PreemptedError) else 2)
    if PartialState().is_main_process:
        draw_figure(result.metrics, [fact.width for fact in result.facts], result.folder / 'training.png')
        print_table(result.facts, title=f'{result.folder.name}: accuracies (%) by width')
        narrowest = result.facts[-1].width
        print(
            f'Figure: {result.folder / "training.png"}\n'
            f"Open it: timm.create_model('local-dir:{result.folder}', pretrained=True, width={narrowest})"
        )
