"""Training of all widths at once on labels, with a test after each epoch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.utils import ModelEmaV3
from torch import nn

from slimclr_hub.data.augment import BatchAugmentation, TimmTransform
from slimclr_hub.data.batches import Batch
from slimclr_hub.data.loaders import EvalLoader
from slimclr_hub.data.sources import Images
from slimclr_hub.data.training import TrainData
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.features import check_labels, extract_features
from slimclr_hub.evaluate.linear_eval.probe import accuracies
from slimclr_hub.finetune.config import FinetuneConfig
from slimclr_hub.finetune.network import keep_frozen
from slimclr_hub.methods import METHODS
from slimclr_hub.methods.batchnorm import sync_batchnorm
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.runs.checkpoints import Checkpoints
from slimclr_hub.runs.job import StopSignals
from slimclr_hub.runs.schedule import Schedule
from slimclr_hub.train.network_job import NetworkJob
from slimclr_hub.train.run_folder import RunFolder
from slimclr_hub.train.setup import make_optimizer
from slimclr_hub.train.tracking import start_tracker

_TOP = 5


class FineTuning(NetworkJob):
    """Trains a network with a classifier, at all of its widths.

    Args:
        config: The configuration.
        accelerator: Accelerator of the processes.
        signals: Signals that ask to stop.
        network: The network, which is trained in place.
        images: The images to train on, where they are open already.
        validation: The images to test on.
        folder: Folder of the result, the metrics and the checkpoints.

    Attributes:
        ema: Moving average of the network, where the configuration asks for one.

    Raises:
        InputError: The configuration does not fit the images, the network or the processes.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        accelerator: Accelerator,
        signals: StopSignals,
        network: SlimmableResNet,
        images: Images | None,
        validation: EvalLoader,
        folder: RunFolder,
    ) -> None:
        self.config = config
        run, optim, shape = config.run, config.optim, config.data
        data = TrainData(
            shape,
            TimmTransform(shape, config.augment),
            seed=run.seed,
            processes=accelerator.num_processes,
            rank=accelerator.process_index,
            microbatches=optim.accumulation_steps,
            view_count=1,
            device=accelerator.device,
            num_classes=network.num_classes,
            classes_key='model.num_classes',
            images=images,
        )
        if config.augment.mixes and data.size % 2:
            raise InputError(
                f'augment.mixup and cutmix take images in pairs, and a microbatch has {data.size}; give a '
                'data.batch_size that leaves an even number to each'
            )
        super().__init__(
            accelerator,
            signals,
            data,
            shape,
            channels_last=run.channels_last,
            epochs=optim.epochs,
            title='fine-tuning',
            log_every=run.log_every,
        )
        self.schedule = Schedule(
            epochs=optim.epochs,
            steps_per_epoch=self.steps_per_epoch,
            warmup_epochs=optim.warmup_epochs,
            lr=optim.lr,
            widths=network.widths,
            slow_start_epochs=0,
        )
        self.augment = BatchAugmentation(config.augment, network.num_classes, accelerator.device)
        set_seed(run.seed)
        method: nn.Module = METHODS['supervised'](network, distillation=config.model.distillation)
        if accelerator.num_processes > 1:
            # So that a batch is normalised as one process would, however few images each has.
            method = sync_batchnorm(method, accelerator.device)
        keep_frozen(network, config.model)
        if run.channels_last:
            method.to(memory_format=torch.channels_last)
        if run.compile:
            network.compile_widths()
        self.prepare(method, make_optimizer(optim, network, accelerator.scaler is None, optim.layer_decay))
        self.ema = ModelEmaV3(self.inner.backbone, optim.ema) if optim.ema is not None else None
        self.validation = validation.prepared(accelerator)
        self.folder = folder
        self.checkpoints = Checkpoints(folder.path, accelerator, keep=1)

    @property
    def network(self) -> SlimmableResNet:
        """What is tested and saved: the moving average, or else the network itself."""
        return self.inner.backbone if self.ema is None else self.ema.module

    def run(self) -> None:
        """Train to the end, from the newest checkpoint if there is one.

        Raises:
            DivergedError: The loss is not finite; the optimizer has not moved, and the state is kept.
            PreemptedError: A signal asked to stop; the state is kept.
        """
        found = self.resume()
        for note in self.data.notes:
            self.accelerator.print(note)
        start_tracker(self.config, self.config.run, self.accelerator, self.folder.path, self.step)
        epoch, start = divmod(self.step, self.steps_per_epoch)
        if found.path is None:
            self.folder.put_metrics_aside()
        else:
            self.folder.drop_metrics_after(self.step, evaluation_too=not found.state['evaluated'])
            if start == 0 and not found.state['evaluated']:
                self.evaluate_or_stop(epoch)
        self.train()

    # Steps

    def set_training(self) -> None:
        """Put what trains into training mode."""
        super().set_training()
        keep_frozen(self.inner.backbone, self.config.model)

    def train_step(self, batch: list[Batch]) -> dict[str, Any] | None:
        """Take one optimizer step on the microbatches of a batch."""
        lr, rank = self.schedule.lr_at(self.step), self.accelerator.process_index
        for group in self.optimizer.param_groups:
            group['lr'] = lr * group.get('lr_scale', 1.0)
        augmented = []
        for i, part in enumerate(batch):
            images, labels = self.augment(part.views[0], part.labels, self.config.run.seed, self.step, i, rank)
            augmented.append(replace(part, views=(images,), labels=labels))
        norm = self.gradients(augmented, self.schedule.widths, None, {'lr': lr})
        if self.config.optim.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(self.trained, self.config.optim.clip_grad, norm)
        self.take_step()
        if self.ema is not None:
            self.ema.update(self.inner.backbone)
        return batch[-1].position

    @property
    def after_divergence(self) -> str:
        """Sentences that say what may help, after a loss that was not finite."""
        return f'Lower optim.lr {self.config.optim.lr:g} or, with fp16, use --run.precision bf16, and begin anew'

    # Checkpoints

    def checkpoint_is_due(self, epoch: int | None) -> bool:
        """True every run.checkpoint_steps steps, and after an epoch that ends a minute after the last checkpoint."""
        steps = self.config.run.checkpoint_steps
        return (steps is not None and self.step % steps == 0) or (epoch is not None and self.a_minute_unsaved())

    def state(self) -> dict[str, Any]:
        """Nothing besides the step: the settings stand in the folder."""
        return {}

    def own(self) -> dict[str, Any]:
        """The running statistics, and the moving average."""
        average = {} if self.ema is None else {'ema': dict(self.ema.module.state_dict())}
        return {**super().own(), **average}

    def restore(self, state: dict[str, Any], own: dict[str, Any]) -> None:
        """Load the running statistics and the moving average."""
        super().restore(state, own)
        if self.ema is not None:
            self.ema.module.load_state_dict(own['ema'])

    # Between steps

    def log(self, epoch: int) -> None:
        """Write the means since the last line of metrics.jsonl."""
        self.write_means(epoch)

    def evaluate(self, epoch: int) -> None:
        """Measure the accuracies of every width, where as many images were trained on as are tested, and at the end."""
        trained, tested = self.steps_per_epoch * self.batch_size, self.validation.total
        if epoch < self.epochs and epoch * trained // tested == (epoch - 1) * trained // tested:
            return
        network = self.network.eval()
        logits, labels = extract_features(self.accelerator, network, self.validation, network.widths)
        check_labels(labels, network.num_classes, str(self.config.data.val_split), 'model.num_classes')
        values = {
            f'{name}/{width:g}': accuracy
            for name, k in (('top1', 1), *((('top5', _TOP),) if network.num_classes > _TOP else ()))
            for width, accuracy in accuracies(lambda x, _: x, logits, labels, k).items()
        }
        self.folder.write_metrics({'kind': 'eval', 'epoch': epoch, 'step': self.step, **values, 'images': len(labels)})
        self.track('eval', values)


def last_accuracies(metrics: Sequence[Mapping[str, Any]], name: str) -> dict[float, float]:
    """The last accuracies by width in lines of metrics.jsonl, under `name/WIDTH`."""
    last: Mapping[str, Any] = next((record for record in reversed(metrics) if record['kind'] == 'eval'), {})
    return {float(key.partition('/')[2]): value for key, value in last.items() if key.startswith(f'{name}/')}
