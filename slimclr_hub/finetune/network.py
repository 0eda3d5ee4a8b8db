"""The network that a fine-tuning starts from: any of this package's, a plain ResNet, or random weights."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimclr_hub.data.loaders import EvalLoader
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.baselines import draw_weights
from slimclr_hub.evaluate.features import check_labels, extract_features
from slimclr_hub.evaluate.logistic import fit_linear
from slimclr_hub.evaluate.network import check_network, drawn_anew, folder_of
from slimclr_hub.finetune.config import StartConfig
from slimclr_hub.hub.open import open_network
from slimclr_hub.hub.plain import is_timm, open_timm, slimmable_of
from slimclr_hub.models import DEFAULT_WIDTHS, SlimmableResNet
from slimclr_hub.models.layers import SwitchableLinear
from slimclr_hub.models.widths import width_key
from slimclr_hub.weights.checkpoint import read_checkpoint

_FLOOR = 0.1
_PRECISION = 5.0  # of the prior; about the best for 6 images of each class of Fashion-MNIST


def open_start(network: str, config: StartConfig) -> SlimmableResNet:
    """Open the network to start from, without what a training moves; random weights are drawn by torch's generator.

    A plain ResNet, as a name of timm's or a checkpoint's file, becomes a slimmable one whose narrower widths have the
    leading channels of its weights, and have seen no image.

    Raises:
        InputError: There is no such network, it does not have these widths, or frozen normalisation has no statistics.
    """
    like = drawn_anew(network)
    model = _open(like or network, config)
    if like is not None:
        draw_weights(model)
    if (config.frozen_norm or config.frozen) and not has_statistics(model):
        key = 'model.frozen_norm' if config.frozen_norm else f'model.frozen {config.frozen}'
        raise InputError(
            f'{key}: {network} has no statistics of normalisation to keep at every width, as it was not trained at '
            'each; train it whole'
        )
    return model


def _open(network: str, config: StartConfig) -> SlimmableResNet:
    tensors = _plain(network)
    if tensors is None:
        check_network(network)
        widths = {} if config.widths is None else {'widths': config.widths}
        return open_network(network, drop_path_rate=config.drop_path_rate, **widths)
    model = slimmable_of(tensors, network, config.widths or DEFAULT_WIDTHS, config.drop_path_rate)
    if config.widths is not None and not set(config.widths) <= set(model.widths):
        raise InputError(f'{network} has widths {model.widths}, and model.widths is {config.widths}')
    return model


def _plain(network: str) -> dict[str, torch.Tensor] | None:
    """Tensors of a ResNet of timm's, or of a checkpoint that is no safetensors file; None for other names."""
    path = folder_of(network)
    if path.is_file() and path.suffix != '.safetensors':
        return read_checkpoint(path)
    return open_timm(network).state_dict() if is_timm(network) else None


def has_statistics(network: nn.Module) -> bool:
    """True if the normalisation of every width has seen images."""
    return all(layer.num_batches_tracked for layer in network.modules() if isinstance(layer, _BatchNorm))


def fit_head(network: SlimmableResNet, loader: EvalLoader, split: str, accelerator: Accelerator) -> None:
    """Fit the classifier of each width to the features of images of a split, by logistic regression.

    So Kumar et al. 2022 (https://arxiv.org/abs/2202.10054) begin: from a random classifier the first steps would move
    the features away from what was pre-trained. Weights of standardised features have a Gaussian prior, which counts
    the more, the fewer the images are. A slimmable head, which has no classifier of each width's own, is left as it is.

    Raises:
        InputError: An image has no class, or one that the network does not have.
    """
    head = network.fc
    if not isinstance(head, SwitchableLinear):
        return
    network.eval().fc = nn.Identity()
    try:
        features, labels = extract_features(accelerator, network, loader.prepared(accelerator), network.widths)
    finally:
        network.fc = head
    check_labels(labels, network.num_classes, split, 'model.num_classes')
    for width, x in features.items():
        # A feature that hardly varies would get a weight that is out of proportion once the network moves.
        decay = _PRECISION / len(x)
        linear, mean, scale = fit_linear(x, labels, decay, classes=network.num_classes, floor=_FLOOR)
        layer = head[width_key(width)]
        assert isinstance(layer, nn.Linear)
        with torch.no_grad():
            layer.weight.copy_(linear.weight * scale)
            layer.bias.copy_(linear.bias - layer.weight @ mean)


def give_classes(network: SlimmableResNet, classes: int, names: Sequence[str] | None) -> bool:
    """Give a network a new head for these classes, unless it has one for classes of the same names.

    Returns:
        True if it keeps its head.
    """
    known = getattr(network, 'pretrained_cfg', {}).get('label_names')
    if network.num_classes == classes and names is not None and known and list(known) == list(names):
        return True
    network.reset_classifier(classes)
    return False


def frozen_parts(network: SlimmableResNet, count: int) -> list[nn.Module]:
    """The first `count` of the stem and the stages."""
    stages = [stage for name, stage in network.named_children() if name.startswith('layer')]
    parts: list[list[nn.Module]] = [[network.conv1, network.bn1], *([stage] for stage in stages)]
    return [module for part in parts[:count] for module in part]


def keep_frozen(network: SlimmableResNet, config: StartConfig) -> None:
    """Put what does not train into eval mode, and leave its parameters without gradients."""
    for part in frozen_parts(network, config.frozen):
        part.eval().requires_grad_(False)
    if config.frozen_norm:
        for layer in network.modules():
            if isinstance(layer, _BatchNorm):
                layer.eval()
