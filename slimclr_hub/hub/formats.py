"""One width of a slimmable network in the formats of other libraries: timm, torchvision and MMDetection.

All three give the tensors of a ResNet the same names and differ in the channels that they allow: torchvision has those
of width 1.0 alone, MMDetection scales all by one factor, and timm chooses them for each stage, which with some channels
of zeros is enough for every width.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.resnet import ResNet
from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.files import atomic_files
from slimclr_hub.hub.folder import check_overlap, write_folder
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.widths import check_width, scale_channels
from slimclr_hub.weights.layouts import ELSEWHERE
from slimclr_hub.weights.tensor_file import save_pickle
from slimclr_hub.weights.tensor_file import save_tensors as save_safetensors

_STEM = 64
_CHANNELS = (64, 128, 256, 512)
_PROJECTION = 'layer1.0.downsample'
_OWN_FOLDER = 'keep it as it is, in a folder that timm opens after `import slimclr_hub`'

_CARD = """\
---
library_name: timm{licence}
tags:
- image-feature-extraction
- timm
- slimclr
---
# {architecture} at width {width:g}

One width of a slimmable network, as an ordinary network of timm's:

```python
import timm
model = timm.create_model('local-dir:{folder}', pretrained=True)
```

From the Hugging Face Hub it is `hf-hub:USER/NAME` instead of `local-dir:`.
{padding}
Method: Zhao et al., Slimmable Networks for Contrastive Self-supervised Learning, https://arxiv.org/abs/2209.15525.
"""

_PADDING = """
timm's {architecture} cannot be this narrow everywhere, so some channels are zeros: {held:,} parameters where the width
has {needed:,}. They leave the output as it is, and stay zeros in training.{features}
"""


def save_timm_folder(
    model: SlimmableResNet, width: float, folder: Path, *, card: str | None = None, tagged: bool = False
) -> None:
    """Write one width as a folder that timm opens without this package: config.json, model.safetensors and README.md.

    `timm.create_model('local-dir:FOLDER', pretrained=True)` opens it as a `resnet50` (18, 34, 101, 152) with the
    same output and preprocessing.

    A `resnet50` has a stem of 64 channels, blocks with four times as many output as inner channels, and a projection in
    the first block only if that changes the number of channels. Channels that a width lacks are zeros: in the stem at
    every width below 1.0; in the first stage if it would have 16 channels, as at 0.25; and wherever `int(C * width)`
    drops a fraction. Only in the last case do the features end in up to three zeros (1640 features instead of 1638 at
    width 0.8). Such channels stay zeros in training, since a ReLU passes no gradient at zero.

    The basic blocks of a `resnet18` or `resnet34` take any number of channels. Below width 1.0 only the stem has
    zeros, and the first block, where timm wants a projection of the stem's 64 channels, has one that is the identity.

    Args:
        model: A slimmable ResNet-18, 34, 50, 101 or 152.
        width: One of its widths.
        folder: Where to write; made if it does not exist.
        card: Text of the model card; by default one that says how to open the folder.
        tagged: True if these are the weights of the tag that the network was built with; origin and licence are then
            recorded.

    Raises:
        InputError: The network does not hold `width`, or timm has no such network.
    """
    width = check_width(width, model.widths)
    tensors: dict[str, torch.Tensor] = dict(model.extract(width).state_dict())
    network = _timm_network(model, tensors)
    if card is None:
        needed = sum(tensors[name].numel() for name, _ in network.named_parameters() if name in tensors)
        card = _card(model, width, folder, network, needed, tagged)
    if len(network.state_dict()) > len(tensors):
        tensors |= identity_projection(network)
    runs = model.global_pool.feat_mult()
    padded = {name: _padded(name, tensors[name], whole.shape, runs) for name, whole in network.state_dict().items()}
    write_folder(network, padded, folder, card, tagged=tagged, width=width)


def torchvision_state_dict(model: SlimmableResNet, width: float = 1.0) -> dict[str, torch.Tensor]:
    """Make a state dict for `torchvision.models.resnet50` (18, 34, 101, 152), which loads it strictly.

    Without a head it has no `fc`; replace torchvision's by `nn.Identity()` before loading. torchvision has no width but
    1.0.

    Raises:
        InputError: torchvision has no such network; the message names the formats that do.
    """
    width = check_width(width, model.widths)
    _counterpart(model, 'torchvision')
    elsewhere = '--format timm and --format mmdet have it'
    if width != 1.0:
        raise InputError(f'width {width}: the channels of torchvision are fixed, at width 1.0; {elsewhere}')
    if model.in_chans != 3:
        raise InputError(f'images of {model.in_chans} channels: those of torchvision have 3; {elsewhere}')
    pool = model.global_pool.pool_type
    if model.num_classes > 0 and pool != 'avg':
        raise InputError(f"global_pool {pool!r}: the head of torchvision pools by 'avg'; --format timm has it")
    return dict(model.extract(width).state_dict())


def mmdet_state_dict(model: SlimmableResNet, width: float) -> dict[str, torch.Tensor]:
    """Make a state dict of the backbone, without a head, for the `ResNet` of MMDetection that `mmdet_config` describes.

    Raises:
        InputError: MMDetection has no such network; the message names the formats that do.
    """
    width = check_width(width, model.widths)
    _mmdet_channels(model, width)
    return {name: tensor for name, tensor in model.extract(width).state_dict().items() if not name.startswith('fc.')}


def mmdet_config(model: SlimmableResNet, width: float, checkpoint: str) -> dict[str, Any]:
    """Make the backbone of an MMDetection config that loads the tensors of `mmdet_state_dict`.

    The neck needs the channels of the feature maps: `in_channels` is `width` times (256, 512, 1024, 2048), or a quarter
    of that for a ResNet-18 or 34. A config that inherits another needs `_delete_=True` beside these entries.
    `checkpoint` is path or address of a `.pth` file.

    Raises:
        InputError: As in `mmdet_state_dict`, or MMDetection does not read such a file.
    """
    channels = _mmdet_channels(model, check_width(width, model.widths))
    if checkpoint.endswith('.safetensors'):
        raise InputError(f'MMDetection does not read {checkpoint}; save the tensors as .pth')
    colours = {} if model.in_chans == 3 else {'in_channels': model.in_chans}
    return {
        'type': 'ResNet',
        'depth': int(_counterpart(model, 'MMDetection').removeprefix('resnet')),
        **colours,
        'base_channels': channels,
        'stem_channels': channels,
        'num_stages': 4,
        'out_indices': (0, 1, 2, 3),
        'norm_cfg': {'type': 'BN', 'requires_grad': True},
        'style': 'pytorch',
        'init_cfg': {'type': 'Pretrained', 'checkpoint': checkpoint},
    }


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors to a file atomically: `.safetensors`, or `.pth` and `.pt` for `torch.load(weights_only=True)`.

    Raises:
        InputError: The file's name ends in none of these.
    """
    if path.suffix == '.safetensors':
        save_safetensors(tensors, path)
    elif path.suffix in ('.pth', '.pt'):
        # Copies: a view would be saved with all of its storage.
        copies = {
            name: tensor.detach().to('cpu', copy=True, memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        with atomic_files(path.parent) as partial:
            save_pickle(copies, partial / path.name)
    else:
        raise InputError(f'{path} does not end in .safetensors, .pth or .pt')


def _counterpart(model: SlimmableResNet, library: str) -> str:
    """Name of the network that `library` has at width 1.0; the widths of `model` overlap."""
    architecture = _configuration(model).get('architecture', type(model).__name__)
    check_overlap(model.overlap, architecture)
    stages = [stage for name, stage in model.named_children() if name.startswith('layer')]
    blocks = tuple(len(stage) for stage in stages if isinstance(stage, nn.Sequential))
    expansion, rest = divmod(model.full_features, _CHANNELS[-1])
    name = ELSEWHERE.get((expansion, blocks, _STEM))
    if name is None or rest or model.conv1.kernel_size != (7, 7):
        raise InputError(f'{library} has {", ".join(ELSEWHERE.values())}, but no {architecture}; {_OWN_FOLDER}')
    return name


def _configuration(model: nn.Module) -> dict[str, Any]:
    # There is none where the network was not built by timm's factory.
    return getattr(model, 'pretrained_cfg', {})


def _mmdet_channels(model: SlimmableResNet, width: float) -> int:
    """Channels of MMDetection's stem and first stage."""
    _counterpart(model, 'MMDetection')
    if model.output_stride != 32:
        raise InputError(f'output_stride {model.output_stride}: MMDetection dilates otherwise; --format timm has it')
    channels = _CHANNELS[0] * width
    if not channels.is_integer():
        raise InputError(f'width {width}: MMDetection has no stage of {channels:g} channels; --format timm has it')
    return int(channels)


# timm


def _timm_network(model: SlimmableResNet, tensors: Mapping[str, torch.Tensor]) -> ResNet:
    """Build timm's network that has room for the tensors of one width, on the meta device."""
    architecture = _counterpart(model, 'timm')
    expansion = model.full_features // _CHANNELS[-1]
    last = 'conv2' if expansion == 1 else 'conv3'
    outer = [len(tensors[f'layer{stage}.0.{last}.weight']) for stage in (1, 2, 3, 4)]
    channels = [-(-count // expansion) for count in outer]
    if expansion > 1 and channels[0] * expansion == _STEM:
        channels[0] += 1  # or there is no projection
    arguments: dict[str, Any] = {}
    if tuple(channels) != _CHANNELS:
        arguments['channels'] = tuple(channels)
    if model.output_stride != 32:
        arguments['output_stride'] = model.output_stride
    network = timm.create_model(
        architecture,
        pretrained_cfg={
            **_configuration(model),
            'architecture': architecture,
            'first_conv': 'conv1',
            'classifier': 'fc',
        },
        num_classes=model.num_classes,
        in_chans=model.in_chans,
        global_pool=model.global_pool.pool_type,
        device='meta',
        **arguments,
    )
    assert isinstance(network, ResNet)
    return network


def identity_projection(network: ResNet) -> dict[str, torch.Tensor]:
    """Tensors of the first block's projection with which it leaves the first channels of its input as they are."""
    convolution, norm = (network.get_submodule(f'{_PROJECTION}.{i}') for i in (0, 1))
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    weight = torch.eye(convolution.out_channels, convolution.in_channels)[:, :, None, None]
    scale = torch.full((norm.num_features,), math.sqrt(1 + norm.eps))
    zeros, count = torch.zeros_like(scale), torch.zeros((), dtype=torch.long)
    tensors = {'weight': scale, 'bias': zeros, 'running_mean': zeros, 'running_var': torch.ones_like(scale)}
    named = {f'{_PROJECTION}.1.{name}': tensor for name, tensor in {**tensors, 'num_batches_tracked': count}.items()}
    return {f'{_PROJECTION}.0.weight': weight, **named}


def _padded(name: str, tensor: torch.Tensor, shape: Sequence[int], runs: int) -> torch.Tensor:
    """Pad the tensor `name` to `shape` with idle channels; in the head's input, at the end of each of `runs` runs."""
    if name == 'fc.weight':
        tensor, shape = tensor.unflatten(1, (runs, -1)), (shape[0], runs, shape[1] // runs)
    whole = tensor.new_full(tuple(shape), 1 if name.endswith('.running_var') else 0)
    whole[tuple(slice(n) for n in tensor.shape)] = tensor
    return whole.flatten(1) if name == 'fc.weight' else whole


def _card(model: SlimmableResNet, width: float, folder: Path, network: ResNet, needed: int, tagged: bool) -> str:
    held = sum(parameter.numel() for parameter in network.parameters())
    architecture = _counterpart(model, 'timm')
    spare = network.num_features - scale_channels(model.full_features, width)
    features = f' Of the {network.num_features} features the last {spare} are always zero.' if spare else ''
    padding = _PADDING.format(architecture=architecture, held=held, needed=needed, features=features)
    licence = _configuration(model).get('license') if tagged else None
    return _CARD.format(
        licence=f'\nlicense: {licence}' if licence else '',
        architecture=architecture,
        width=width,
        folder=folder.name,  # the whole path is of this machine alone
        padding=padding if held != needed else '',
    )
