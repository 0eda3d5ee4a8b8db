"""Accuracies at every width while a network trains: k-NN, a linear probe, and the network's own classifier."""

import copy
from itertools import islice

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from slimclr_hub.data.loaders import eval_loader
from slimclr_hub.data.sources import has_validation
from slimclr_hub.distributed import average_batchnorm
from slimclr_hub.evaluate.features import extract_features
from slimclr_hub.evaluate.knn import knn_predict
from slimclr_hub.evaluate.logistic import linear_predict
from slimclr_hub.methods.batchnorm import split_batchnorm
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.calibrate import calibrate_batchnorm, is_calibrated
from slimclr_hub.train.config import PretrainConfig

Accuracies = dict[str, dict[float, float]]
"""Kind of evaluation -> width -> accuracy in percent."""

TITLES = {'knn': 'k-NN', 'linear': 'linear', 'top1': 'top-1'}
_CALIBRATION_BATCHES = 8


class OnlineEvaluation:
    """Classifies the validation split at every width, by what the training split shows.

    A width that has not trained yet, as all at the random initialisation and the narrower ones during slow start, has
    no statistics of batch normalisation; they are estimated first, on a copy.

    Attributes:
        facts: Neighbours `k` and number of test `images` of the last evaluation.
    """

    def __init__(self, config: PretrainConfig, accelerator: Accelerator) -> None:
        assert config.data.val_split is not None
        self._config = config
        self._accelerator = accelerator
        self.facts: dict[str, int] = {}
        self._bank = self._loader(config.data.train_split, config.knn.bank)
        self._queries = self._loader(config.data.val_split, None)

    def _loader(self, split: str, at_most: int | None) -> DataLoader:
        config, accelerator = self._config, self._accelerator
        loader = eval_loader(config.data, split, at_most, config.run.seed, accelerator.num_processes)
        return accelerator.prepare_data_loader(loader)

    def __call__(self, backbone: SlimmableResNet, epoch: int) -> Accuracies:
        """Percentages due after `epoch`: `knn`, `linear`, with a classifier `top1`; the network stays as it was."""
        config = self._config
        due = {'knn': config.is_due(epoch, config.knn.every), 'linear': config.is_due(epoch, config.probe.every)}
        if not any(due.values()):
            return {}
        backbone = copy.deepcopy(backbone).eval()
        split_batchnorm(backbone, 1)
        for width in backbone.widths:
            if not is_calibrated(backbone, width):
                calibrate_batchnorm(backbone, width, (images for images, _ in islice(self._bank, _CALIBRATION_BATCHES)))
        average_batchnorm(backbone)
        accuracies: Accuracies = {}
        if backbone.num_classes:
            outputs, truth = extract_features(self._accelerator, backbone, self._queries, backbone.widths)
            accuracies['top1'] = {width: _percent(outputs[width].argmax(1), truth) for width in backbone.widths}
            backbone.reset_classifier(0)
        bank, labels = extract_features(self._accelerator, backbone, self._bank, backbone.widths)
        queries, truth = extract_features(self._accelerator, backbone, self._queries, backbone.widths)
        k = config.knn.neighbours(labels)
        self.facts = {'k': k, 'images': len(truth)}
        temperature = config.knn.temperature
        for width in backbone.widths:
            if due['knn']:
                predictions = knn_predict(queries[width], bank[width], labels, k, temperature)
                accuracies.setdefault('knn', {})[width] = _percent(predictions, truth)
            if due['linear']:
                predictions = linear_predict(queries[width], bank[width], labels, config.probe.weight_decay)
                accuracies.setdefault('linear', {})[width] = _percent(predictions, truth)
        return accuracies


def _percent(predictions: torch.Tensor, truth: torch.Tensor) -> float:
    return 100 * (predictions == truth).float().mean().item()


def online_evaluation(config: PretrainConfig, accelerator: Accelerator) -> OnlineEvaluation | None:
    """The evaluation that a configuration asks for; none where it asks for none or there is nothing to validate on."""
    if config.knn.every == 0 and config.probe.every == 0:
        return None
    if not has_validation(config.data):
        accelerator.print(
            f'Evaluation while training is off: data.val_split {config.data.val_split} is not apart from the training '
            'images'
        )
        return None
    if config.data.streams and accelerator.num_processes > 1:
        accelerator.print(
            'Evaluation while training is off: a stream does not come in equal parts for several processes'
        )
        return None
    return OnlineEvaluation(config, accelerator)
