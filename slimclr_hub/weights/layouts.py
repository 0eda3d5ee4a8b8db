"""Architecture, widths and head of a ResNet, recognised from the names and shapes of its tensors."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slimclr_hub.errors import InputError
from slimclr_hub.weights.slices import DISJOINT, key_width, scale_channels, switched_key, width_key

ARCHITECTURES = {
    (1, (2, 2, 2, 2), 64): 'slimclr_resnet18',
    (1, (3, 4, 6, 3), 64): 'slimclr_resnet34',
    (4, (3, 4, 6, 3), 64): 'slimclr_resnet50',
    (4, (3, 4, 23, 3), 64): 'slimclr_resnet101',
    (4, (3, 8, 36, 3), 64): 'slimclr_resnet152',
    (1, (3, 3, 3), 16): 'slimclr_resnet20',
    (1, (3, 3, 3), 64): 'slimclr_resnet20x4',
}
"""Expansion of a block, blocks in each stage and channels of the stem -> name in timm's registry."""

ELSEWHERE = {key: name.removeprefix('slimclr_') for key, name in ARCHITECTURES.items() if len(key[1]) == 4}
"""The same, for those that timm, torchvision and MMDetection have at width 1.0, with their name there."""

_TENSOR_OF_BLOCK = re.compile(r'layer([1-9])\.(\d{1,3})\.')

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Layout:
    """Description of the network that tensors under this package's names belong to.

    Args:
        expansion: Output channels of a block over its inner ones: 4 for bottlenecks, 1 for basic blocks.
        stages: Blocks in each stage.
        stem: Channels of the first convolution.
        in_chans: Channels of the images.
        widths: Widths with a normalisation of their own, in descending order; none in a dense network's file.
        num_classes: Classes of its head; 0 without one.
        head: `switchable`, `slimmable` (or dense), or `none`.
        overlap: True if sub-networks share channels with each other; false if only with the largest.
    """

    expansion: int
    stages: tuple[int, ...]
    stem: int
    in_chans: int
    widths: tuple[float, ...]
    num_classes: int
    head: str
    overlap: bool = True

    @property
    def full_stem(self) -> int:
        """Channels of the first convolution at width 1.0, inferred from the largest width."""
        largest = max(self.widths, default=1.0)
        known = (stem for _, _, stem in ARCHITECTURES if scale_channels(stem, largest) == self.stem)
        return next(known, round(self.stem / largest))

    @property
    def architecture(self) -> str | None:
        """Name in timm's registry, if it is one of ours."""
        return ARCHITECTURES.get((self.expansion, self.stages, self.full_stem))

    def __str__(self) -> str:
        blocks = f'{"bottleneck" if self.expansion > 1 else "basic"} blocks {self.stages}'
        text = f'a ResNet of {blocks} with {self.stem} channels in its stem'
        text += f' at widths {", ".join(map(str, self.widths))}' if self.widths else ''
        return text if self.overlap else f'{text} that do not overlap'


def layout_of(shapes: Shapes) -> Layout:
    """Recognise a network from the names and shapes of its tensors.

    Raises:
        InputError: There is no first convolution or no stage, or one or a head has not the dimensions of its kind.
    """
    tensors = Counter((int(m[1]), int(m[2])) for name in shapes if (m := _TENSOR_OF_BLOCK.match(name)))
    blocks: dict[int, int] = {}
    for (stage, block), count in tensors.items():
        if count > 1:  # a single tensor is a stray one, to be named as not expected
            blocks[stage] = max(blocks.get(stage, 0), block + 1)
    if 'conv1.weight' not in shapes or not blocks:
        raise InputError('conv1.weight and layer1 are missing: these are not the tensors of a ResNet')
    if len(shapes['conv1.weight']) != 4:
        raise InputError(f'conv1.weight has shape {list(shapes["conv1.weight"])}, not that of a convolution')
    heads = [name for name in shapes if name.startswith('fc.') and name.endswith('.weight')]
    for name in heads:
        if not shapes[name]:  # other shapes are compared with the network's
            raise InputError(f'{name} has shape {list(shapes[name])}, not that of a linear layer')
    keys = {key for name in shapes if not name.startswith('fc.') and (key := switched_key(name))}
    widths = tuple(sorted(map(key_width, keys), reverse=True))
    for width in widths:
        if not 0 < width <= 1:
            raise InputError(f'width {width:g}, of {width_key(width)}, is outside (0, 1]')
    return Layout(
        expansion=4 if any(name.endswith('.conv3.weight') for name in shapes) else 1,
        stages=tuple(blocks.get(stage, 0) for stage in range(1, max(blocks) + 1)),
        stem=shapes['conv1.weight'][0],
        in_chans=shapes['conv1.weight'][1],
        widths=widths,
        num_classes=shapes[heads[0]][0] if heads else 0,
        head='none' if not heads else 'slimmable' if heads == ['fc.weight'] else 'switchable',
        overlap=DISJOINT not in shapes,
    )


def mismatches(expected: Shapes, found: Shapes) -> list[str]:
    """Name each tensor that is missing, not expected or misshapen, in a few words."""
    return [
        *(f'{name} is missing' for name in expected if name not in found),
        *(f'{name} is not expected' for name in found if name not in expected),
        *(
            f'{name} has shape {list(found[name])}, not {list(shape)}'
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != tuple(shape)
        ),
    ]
