"""Pre-training from the command line to the finished folder: what `recipes/pretrain.py` runs."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState

from slimclr_hub.runs.command_line import run_script
from slimclr_hub.runs.job import StopSignals
from slimclr_hub.runs.lock import folder_lock
from slimclr_hub.settings import RECIPE
from slimclr_hub.train.command import AUTO, Command, check_unchanged, load_recipe, parse_pretrain
from slimclr_hub.train.report import compare_with_itself, write_result
from slimclr_hub.train.run_folder import RunFolder, find_run
from slimclr_hub.train.trainer import Trainer, make_accelerator


def main(default: Path) -> None:
    """Read the command line, over the recipe `default` if it names none; train; end with a table and figures."""
    run_script(lambda: _main(default))


def _main(default: Path) -> None:
    folder = pretrain(parse_pretrain(default))
    if PartialState().is_main_process:
        figures = [folder / 'training', *compare_with_itself(folder)]
        narrowest = min(load_recipe(folder / RECIPE).model.widths)
        print(
            f'Figures: {", ".join(f"{figure}.png" for figure in figures)}\n'
            f"Open it: timm.create_model('local-dir:{folder}', pretrained=True, width={narrowest})"
        )


def pretrain(command: Command) -> Path:
    """Pre-train a network on the processes and devices that accelerate was launched with.

    Returns:
        The folder of the run, which `timm.create_model('local-dir:...')` opens.

    Raises:
        InputError: The configuration or the folder does not fit, found before training starts.
        DataError: More images than allowed cannot be read.
        DivergedError: The loss is not finite; the optimizer has not moved, and the state is kept.
        PreemptedError: A signal asked to stop; the state is kept.
    """
    started = command.config
    accelerator = make_accelerator(
        started.run.precision,
        started.run,
        started.run.output,
        # During slow start sub-networks have no gradient, and DDP has to be told to expect it.
        find_unused_parameters=started.slow_start > 0 and len(started.model.widths) > 1,
    )
    # The recipe records the precision that accelerate was launched with.
    run = replace(started.run, precision=accelerator.mixed_precision)
    command = replace(command, config=replace(started, run=run))
    config, resume = command.config, command.resume
    if resume == AUTO:
        resume = find_run(config, accelerator)
        if resume is not None:
            check_unchanged(load_recipe(resume / RECIPE), command)
    recipe = config
    if resume is not None:
        # The checkpoint replaces the weights to start from, and they may be gone by now.
        config = replace(config, model=replace(config.model, weights=None))
    with ExitStack() as stack:
        with StopSignals() as signals:
            trainer = Trainer(config, accelerator, signals)
            folder = RunFolder.create(recipe, accelerator) if resume is None else RunFolder(resume, accelerator)
            stack.enter_context(folder_lock(folder.path, accelerator))
            trainer.run(folder, resume is not None, recipe, command.allow_changes)
        write_result(config, trainer.inner.backbone, folder, accelerator)
    accelerator.end_training()
    return folder.path
