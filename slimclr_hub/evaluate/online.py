"""k-NN accuracy at every width while a network trains."""

import copy
from itertools import islice

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from slimclr_hub.data.loaders import eval_loader
from slimclr_hub.data.sources import has_validation
from slimclr_hub.evaluate.features import extract_features
from slimclr_hub.evaluate.knn import knn_predict
from slimclr_hub.methods.processes import average_batchnorm
from slimclr_hub.methods.split_batchnorm import split_batchnorm
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.calibrate import calibrate_batchnorm, is_calibrated
from slimclr_hub.train.config import PretrainConfig

_CALIBRATION_BATCHES = 8


class OnlineKNN:
    """Classifies the validation split by the training split, at every width.

    A width that has not trained yet, as all at the random initialisation and the narrower ones during slow start, has
    no statistics of batch normalisation; they are estimated first, on a copy.

    Args:
        config: The run's configuration.
        accelerator: The processes.
    """

    def __init__(self, config: PretrainConfig, accelerator: Accelerator) -> None:
        assert config.data.val_split is not None
        self._config = config.knn
        self._accelerator = accelerator
        self._bank = self._loader(config, config.data.train_split, config.knn.bank)
        self._queries = self._loader(config, config.data.val_split, None)

    def _loader(self, config: PretrainConfig, split: str, at_most: int | None) -> DataLoader:
        loader = eval_loader(config.data, split, at_most, config.run.seed, self._accelerator.num_processes)
        return self._accelerator.prepare_data_loader(loader)

    def __call__(self, backbone: SlimmableResNet) -> dict[float, float]:
        """Accuracy in percent of each width; the network itself is left as it was."""
        backbone = copy.deepcopy(backbone).eval()
        split_batchnorm(backbone, 1)
        for width in backbone.widths:
            if not is_calibrated(backbone, width):
                calibrate_batchnorm(backbone, width, (images for images, _ in islice(self._bank, _CALIBRATION_BATCHES)))
        average_batchnorm(backbone)
        bank, labels = extract_features(self._accelerator, backbone, self._bank, backbone.widths)
        queries, truth = extract_features(self._accelerator, backbone, self._queries, backbone.widths)
        return {width: 100 * self._accuracy(queries[width], truth, bank[width], labels) for width in backbone.widths}

    def _accuracy(self, queries: torch.Tensor, truth: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor) -> float:
        predictions = knn_predict(queries, bank, labels, self._config.k, self._config.temperature)
        return (predictions == truth).float().mean().item()


def online_knn(config: PretrainConfig, accelerator: Accelerator) -> OnlineKNN | None:
    """The evaluation that a configuration asks for; none where it asks for none or there is nothing to validate on."""
    if config.knn.every == 0:
        return None
    if not has_validation(config.data):
        accelerator.print(
            f'k-NN accuracy is off: data.val_split {config.data.val_split} is not apart from the training images'
        )
        return None
    if config.data.streams and accelerator.num_processes > 1:
        accelerator.print('k-NN accuracy is off: a stream does not come in equal parts for several processes')
        return None
    return OnlineKNN(config, accelerator)
