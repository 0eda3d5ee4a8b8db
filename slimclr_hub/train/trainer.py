"""The pre-training of a slimmable network: one optimizer step, and what lies between steps."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from tqdm.auto import tqdm

from slimclr_hub.data.batches import Batch
from slimclr_hub.data.training import TrainData
from slimclr_hub.errors import InputError
from slimclr_hub.methods.batchnorm import sync_batchnorm
from slimclr_hub.methods.objective import Objective
from slimclr_hub.methods.registry import training_of
from slimclr_hub.runs.checkpoints import Checkpoints, Found
from slimclr_hub.runs.job import StopSignals
from slimclr_hub.runs.launcher import launched
from slimclr_hub.settings import RECIPE, differences, relevant
from slimclr_hub.train.collapse import CollapseWatch
from slimclr_hub.train.config import PretrainConfig, TrackerConfig
from slimclr_hub.train.diagnostics import GradientObserver, observe
from slimclr_hub.train.network_job import NetworkJob
from slimclr_hub.train.online import TITLES, Qualities, online_evaluation
from slimclr_hub.train.run_folder import RunFolder
from slimclr_hub.train.setup import arrange, make_method, make_optimizer, make_schedule
from slimclr_hub.train.teacher import check_identity, identity, known_images, looks_once, open_teacher
from slimclr_hub.train.tracking import start_tracker
from slimclr_hub.weights.source import WEIGHTS


class Trainer(NetworkJob):
    """Pre-trains a network as configured.

    Attributes:
        folder: Folder of the run, once `run` has begun.

    Raises:
        InputError: The configuration does not fit the images, the network, the teacher or the processes.
    """

    folder: RunFolder

    def __init__(self, config: PretrainConfig, accelerator: Accelerator, signals: StopSignals) -> None:
        self.config = config
        self.teacher = teacher = open_teacher(config)
        self._identity = None if teacher is None else identity(config.teacher, teacher)
        data = TrainData(
            config.data,
            config.views,
            config.second_views,
            seed=config.run.seed,
            processes=accelerator.num_processes,
            rank=accelerator.process_index,
            microbatches=config.optim.accumulation_steps,
            view_count=config.view_count,
            device=accelerator.device,
            num_classes=config.method.num_classes,
        )
        if (splits := config.method.bn_splits or 1) > 1 and data.size % splits:
            each = f'{data.size} images of a microbatch on each of {accelerator.num_processes} processes'
            raise InputError(f'method.bn_splits {splits} does not divide {each}; give another data.batch_size')
        super().__init__(
            accelerator,
            signals,
            data,
            config.data,
            channels_last=config.run.channels_last,
            epochs=config.optim.epochs,
            title='pre-training',
            log_every=config.run.log_every,
        )
        self.schedule = make_schedule(config, self.steps_per_epoch)
        set_seed(config.run.seed)
        method = make_method(config, teacher)
        if config.method.sync_bn and accelerator.num_processes > 1:
            method = sync_batchnorm(method, accelerator.device)
        arrange(config, method)
        self.prepare(method, make_optimizer(config.optim, method, fused=accelerator.scaler is None))
        self.online = online_evaluation(config, accelerator)
        # A method of one's own may have no objective of ours; its ranks are watched all the same.
        self.objective: Objective | None = getattr(self.inner, 'objective', None)
        self.collapse = CollapseWatch(config, self.objective.name if self.objective is not None else None)
        self.observer: GradientObserver | None = None
        self._next_recipe: PretrainConfig | None = None
        self._resumed_step = 0
        self._settings: dict[str, Any] = {}

    def run(self, folder: RunFolder, resumed: bool, recipe: PretrainConfig, allow_changes: bool = False) -> None:
        """Train to the end; a run that is `resumed` goes on from the newest checkpoint of its folder, if there is one.

        With its next checkpoint it records `recipe`: the configuration, with the weights that it started from.

        Raises:
            InputError: The checkpoint was written with other settings, as of a recipe that was edited since, unless
                `allow_changes`; or the metrics are not those of a run.
        """
        config, accelerator = self.config, self.accelerator
        self.folder = folder
        self._settings = relevant(recipe)
        self.checkpoints = Checkpoints(folder.path, accelerator, config.run.keep_checkpoints)
        if resumed:
            found = self.resume()
            if found.path is None and (folder.path / WEIGHTS).exists():
                raise InputError(f'{folder.path} is finished, and has no checkpoint; give another run.name')
            if not allow_changes:
                self._check_settings(found)
            folder.read_metrics()  # refused while nothing has been written
        else:
            found = Found()
            accelerator.print(f'Run: {folder.path}')
        for note in self._notes():
            accelerator.print(note)
        start_tracker(config, config.run, accelerator, folder.path, self.step)
        if accelerator.is_main_process:
            self.observer = observe(config.diagnostics, self.inner, folder.path, self.step)
        if resumed:
            self._next_recipe, self._resumed_step = recipe, self.step
            self._drop_metrics(found)
        if self.teacher is not None and looks_once(config):
            self.data.know(known_images(config, self.teacher, accelerator, self.stop_if_asked))
        epoch, start = divmod(self.step, self.steps_per_epoch)
        if start == 0 and not found.state.get('evaluated', False):
            self.evaluate_or_stop(epoch)
        self.optimizer.zero_grad()
        self.train()
        if unreadable := len(self.data.corrupt.reasons):
            print(f'{unreadable} images could not be read on process {accelerator.process_index}, and were replaced')

    def _check_settings(self, found: Found) -> None:
        written = found.state.get('settings', {})  # those of earlier versions tell none
        both = written.keys() & self._settings.keys()  # another version may have others
        changed = differences({key: written[key] for key in both}, {key: self._settings[key] for key in both})
        if changed:
            raise InputError(
                f'{self.folder.path / RECIPE} is not that of {found.path}: {"; ".join(changed)}; restore it, or give '
                '--allow_changes true'
            )
        if self._identity is not None:
            check_identity(self._identity, found.state, found.path)

    def _drop_metrics(self, found: Found) -> None:
        """Leave the metrics of the steps that the run goes on from."""
        if found.path is not None:
            self.folder.drop_metrics_after(self.step, evaluation_too=not found.state['evaluated'])
            return
        aside = self.folder.put_metrics_aside()
        kept = f'; the metrics until now are in {aside}' if aside is not None else ''
        self.accelerator.print(f'{self.folder.path} has no checkpoint yet; starting from the beginning{kept}')

    def _notes(self) -> Iterator[str]:
        config = self.config
        yield from self.data.notes
        if self._identity is not None:
            yield f'Teacher: {self._identity["network"]}, weights {self._identity["hash"][:8]}'
        if (config.method.queue_size or 0) > self.steps_per_epoch * config.data.batch_size:
            yield (
                f'Warning: method.queue_size {config.method.queue_size} exceeds the images of an epoch; an image will '
                'meet its own older key as a negative'
            )
        in_batch = training_of(config.method.name).negatives_in_batch or config.method.queue_size == 0
        if in_batch and config.optim.accumulation_steps > 1:
            yield (
                f'Warning: method.name {config.method.name} takes its negatives from the batch; with '
                f'optim.accumulation_steps {config.optim.accumulation_steps}, from a microbatch'
            )

    # Steps

    def train_step(self, batch: list[Batch]) -> dict[str, Any] | None:
        """Take one optimizer step on the microbatches of a batch."""
        lr, widths = self.schedule.lr_at(self.step), self.schedule.widths_at(self.step)
        for group in self.optimizer.param_groups:
            group['lr'] = lr
        if hasattr(self.inner, 'set_epoch'):
            self.inner.set_epoch(self.step // self.steps_per_epoch)
        self.gradients(batch, widths, self.schedule.momentum_at(self.step), {'lr': lr})
        if self.observer is not None:
            self.observer(self.inner, self.step, widths)
        self.take_step()
        return batch[-1].position

    @property
    def after_divergence(self) -> str:
        """Sentences that say what may help, after a loss that was not finite."""
        return (
            f'Lower optim.lr {self.config.optim.lr:g} or, with fp16, use --run.precision bf16, and go on from the last '
            f'checkpoint: --resume {self.folder.path} --allow_changes true --optim.lr ...'
        )

    # Checkpoints

    @property
    def how_to_resume(self) -> str:
        """The option that goes on with the run."""
        return f'--resume {self.folder.path}'

    def state(self) -> dict[str, Any]:
        """The settings that have led to it, and the teacher, whose own weights no checkpoint holds."""
        return {'settings': self._settings, **({} if self._identity is None else {'teacher': self._identity})}

    def checkpoint_is_due(self, epoch: int | None) -> bool:
        """True every run.checkpoint_every epochs, every run.checkpoint_steps steps, and after the last epoch."""
        run = self.config.run
        after_epoch = epoch is not None and self.config.is_due(epoch, run.checkpoint_every)
        return after_epoch or (run.checkpoint_steps is not None and self.step % run.checkpoint_steps == 0)

    def save(self, evaluated: bool = True) -> Path:
        """Write a checkpoint, after all that has been observed until then and the recipe that has led to it."""
        self._write_observed(everything=True)
        if self._next_recipe is not None:
            self.folder.keep_recipe(self._next_recipe, self._resumed_step)
            self._next_recipe = None
        return super().save(evaluated)

    # Between steps

    def log(self, epoch: int) -> None:
        """Write the means since the last line of metrics.jsonl."""
        self._write_observed()
        if values := self.write_means(epoch, momentum=self.schedule.momentum_at(self.step - 1)):
            self.collapse.add(values)

    def _write_observed(self, everything: bool = False) -> None:
        if self.observer is not None:
            for step, values in self.observer.write(everything):
                # As other lines of the log, under the step that these gradients make.
                self.track('diagnostics', values, step + 1)

    def evaluate(self, epoch: int) -> None:
        """Measure what is due after `epoch` epochs."""
        qualities = self.online(self.inner.backbone, epoch) if self.online is not None else {}
        if qualities:
            self._write_qualities(epoch, qualities)
        candidates = self.objective.candidates if self.objective is not None else 0
        signs = self.collapse.after(epoch, candidates, qualities.get('rank', {}))
        if signs:
            warning = self.collapse.warning(epoch, signs)
            self.folder.write_metrics({'kind': 'warning', 'epoch': epoch, 'step': self.step, 'text': warning})
            self.track('eval', {'collapsed_widths': len(signs)})
            if self.accelerator.is_main_process:
                tqdm.write(warning)

    def _write_qualities(self, epoch: int, qualities: Qualities) -> None:
        values = {f'{kind}/{width:g}': value for kind, group in qualities.items() for width, value in group.items()}
        facts = self.online.facts if self.online is not None else {}
        self.folder.write_metrics({'kind': 'eval', 'epoch': epoch, 'step': self.step, **values, **facts})
        self.track('eval', values)
        if self.accelerator.is_main_process:
            for kind, group in qualities.items():
                listed = ', '.join(f'{width:g}: {value:.1f}' for width, value in group.items())
                tqdm.write(f'epoch {epoch}: {TITLES[kind]} by width {listed}')


def make_accelerator(
    precision: str | None, tracking: TrackerConfig, folder: str | None, *, find_unused_parameters: bool
) -> Accelerator:
    """The processes, devices and precision that a network is to train on.

    Args:
        precision: As of `launched`.
        tracking: The tracker.
        folder: Where it writes.
        find_unused_parameters: True if some parameters have no gradient in some steps.

    Raises:
        InputError: The launcher or the device does not fit, as of `launched`, or the tracker is not installed.
    """
    tracker = tracking.tracker
    accelerator = launched(
        precision,
        log_with=None if tracker == 'none' else tracker,
        project_dir=folder,
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                find_unused_parameters=find_unused_parameters,
                # Each process normalises by its own statistics; they are averaged before they are used.
                broadcast_buffers=False,
            )
        ],
    )
    if tracker != 'none' and not accelerator.log_with:  # of which accelerate only warns
        raise InputError(f'run.tracker {tracker} is not installed; pip install {tracker} brings it')
    return accelerator
