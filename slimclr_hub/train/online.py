"""Quality at every width while a network trains: rank, k-NN, a linear probe, and the network's own classifier."""

import copy
from collections.abc import Mapping
from itertools import islice

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from slimclr_hub.data.batches import CorruptImages
from slimclr_hub.data.config import WITH_KEYS
from slimclr_hub.data.loaders import EvalLoader, eval_loader
from slimclr_hub.data.sources import has_validation
from slimclr_hub.distributed import average_batchnorm
from slimclr_hub.evaluate.baselines import CALIBRATION_BATCHES, Encoder, raw_pixels
from slimclr_hub.evaluate.features import extract_features
from slimclr_hub.evaluate.knn import knn_predict
from slimclr_hub.evaluate.logistic import linear_predict
from slimclr_hub.evaluate.rank import RANK_IMAGES, effective_rank
from slimclr_hub.methods.batchnorm import split_batchnorm
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.calibrate import calibrate_batchnorm, is_calibrated
from slimclr_hub.runs.result import RAW_PIXELS_KEY
from slimclr_hub.train.config import PretrainConfig

Qualities = dict[str, dict[float, float]]
"""Kind of evaluation -> width -> effective rank, or accuracy in percent."""

TITLES = {
    'rank': 'effective rank',
    'knn': 'k-NN accuracy (%)',
    'linear': 'linear accuracy (%)',
    'top1': 'top-1 accuracy (%)',
}


class OnlineEvaluation:
    """Measures the rank of features of the training split, and classifies the validation split by what they show.

    Without labels, or a validation split, there is the rank alone. A width that has not trained yet, as all at the
    random initialisation and the narrower ones during slow start, has no statistics of batch normalisation; they are
    estimated first, on a copy.

    Attributes:
        facts: Of the last evaluation, the images of the rank, `rank_images`, and where there are accuracies neighbours
            `k` and number of test `images`; of the one before training also what raw pixels reach, `raw_pixels/knn` and
            `raw_pixels/linear`, in percent.
    """

    def __init__(self, config: PretrainConfig, accelerator: Accelerator) -> None:
        self._config = config
        self._accelerator = accelerator
        self._corrupt = CorruptImages(config.data.max_corrupt, 'left out')
        self._noted = False
        self.facts: dict[str, float] = {}
        bank, self._queries = config.knn.bank, None
        if has_validation(config.data):
            assert config.data.val_split is not None
            self._queries = self._loader(config.data.val_split, None)
        else:
            bank = min(bank or RANK_IMAGES, RANK_IMAGES)
        self._bank = self._loader(config.data.train_split, bank)

    def _loader(self, split: str, at_most: int | None) -> EvalLoader:
        config, accelerator = self._config, self._accelerator
        loader = eval_loader(
            config.data, split, at_most, config.run.seed, accelerator.num_processes, corrupt=self._corrupt
        )
        return loader.prepared(accelerator)

    def __call__(self, backbone: SlimmableResNet, epoch: int) -> Qualities:
        """Return what is due after `epoch`; the network stays as it was.

        `rank` is there whenever another is due, `knn` and `linear` where images have labels of at least two classes,
        `top1` with a classifier.
        """
        config = self._config
        due = {'knn': config.is_due(epoch, config.knn.every), 'linear': config.is_due(epoch, config.probe.every)}
        if not any(due.values()):
            return {}
        backbone = copy.deepcopy(backbone).eval()
        split_batchnorm(backbone, 1)
        for width in backbone.widths:
            if not is_calibrated(backbone, width):
                first = islice(self._bank.readable(), CALIBRATION_BATCHES)
                calibrate_batchnorm(backbone, width, (images for images, _ in first))
        average_batchnorm(backbone)
        qualities: Qualities = {}
        if backbone.num_classes and self._queries is not None:
            outputs, truth = extract_features(self._accelerator, backbone, self._queries, backbone.widths)
            if self._are_classes(truth, 'val_split'):
                qualities['top1'] = {width: _percent(outputs[width].argmax(1), truth) for width in backbone.widths}
        if backbone.num_classes:
            backbone.reset_classifier(0)
        bank, labels = extract_features(self._accelerator, backbone, self._bank, backbone.widths)
        qualities['rank'] = {width: effective_rank(bank[width]) for width in backbone.widths}
        self.facts = {'rank_images': min(len(labels), RANK_IMAGES)}
        if self._queries is None or not self._are_classes(labels, 'train_split', at_least=2):
            return qualities
        qualities |= self._classify(backbone, bank, labels, due)
        if epoch == 0 and config.knn.raw_pixels and (pixels := raw_pixels(config.data, self._bank.total)):
            bank, labels = extract_features(self._accelerator, pixels, self._bank, pixels.widths)
            of_pixels = self._classify(pixels, bank, labels, due)
            self.facts |= {f'{RAW_PIXELS_KEY}/{kind}': top1 for kind, of in of_pixels.items() for top1 in of.values()}
        return qualities

    def _are_classes(self, labels: torch.Tensor, split: str, at_least: int = 1) -> bool:
        """True if each image has one of several classes; that it is not so is said once."""
        data, unlabelled = self._config.data, int((labels < 0).sum())
        if not unlabelled and len(labels.unique()) >= at_least:
            return True
        if not self._noted and self._accelerator.is_main_process:
            why = f'{unlabelled} of {len(labels)} images have no class, or several'
            remedy = '; data.label_key says where classes are' if data.name.startswith(WITH_KEYS) else ''
            tqdm.write(
                'While training the rank of features is measured, and no accuracy: of '
                f'data.{split} {getattr(data, split)} {why if unlabelled else "all images are of one class"}{remedy}'
            )
        self._noted = True
        return False

    def _classify(
        self,
        backbone: Encoder,
        bank: Mapping[float, torch.Tensor],
        labels: torch.Tensor,
        due: Mapping[str, bool],
    ) -> Qualities:
        config = self._config
        qualities: Qualities = {}
        queries, truth = extract_features(self._accelerator, backbone, self._queries, backbone.widths)  # type: ignore[arg-type]
        if not self._are_classes(truth, 'val_split'):
            return {}
        k = config.knn.neighbours(labels)
        self.facts |= {'k': k, 'images': len(truth)}
        temperature = config.knn.temperature
        for width in backbone.widths:
            if due['knn']:
                predictions = knn_predict(queries[width], bank[width], labels, k, temperature)
                qualities.setdefault('knn', {})[width] = _percent(predictions, truth)
            if due['linear']:
                predictions = linear_predict(queries[width], bank[width], labels, config.probe.weight_decay)
                qualities.setdefault('linear', {})[width] = _percent(predictions, truth)
        return qualities


def _percent(predictions: torch.Tensor, truth: torch.Tensor) -> float:
    return 100 * (predictions == truth).float().mean().item()


def online_evaluation(config: PretrainConfig, accelerator: Accelerator) -> OnlineEvaluation | None:
    """The evaluation that a configuration asks for; none where it asks for none or a stream has no images for it."""
    if config.knn.every == 0 and config.probe.every == 0:
        return None
    if config.data.streams and accelerator.num_processes > 1:
        accelerator.print(
            'Evaluation while training is off: a stream does not come in equal parts for several processes'
        )
        return None
    if not has_validation(config.data):
        without = f'data.val_split {config.data.val_split} is not apart from the training images'
        if config.data.streams:
            accelerator.print(f'Evaluation while training is off: {without}')
            return None
        accelerator.print(f'While training the rank of features is measured, and no accuracy: {without}')
    return OnlineEvaluation(config, accelerator)
