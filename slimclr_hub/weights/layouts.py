"""What a file of a ResNet's tensors is, told from names and shapes: architecture, widths, whose names."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from slimclr_hub.errors import InputError, shorten
from slimclr_hub.weights.slices import DISJOINT, key_width, scale_channels, switched_key, width_key

RESNET50_STAGES = (3, 4, 6, 3)
DESCENDING = ('w100', 'w075', 'w050', 'w025')
"""Keys of the widths in the order in which the authors' pre-training checkpoints number them."""

ARCHITECTURES = {
    (4, (3, 4, 6, 3), 64): 'slimclr_resnet50',
    (4, (3, 4, 23, 3), 64): 'slimclr_resnet101',
    (4, (3, 8, 36, 3), 64): 'slimclr_resnet152',
    (1, (3, 3, 3), 16): 'slimclr_resnet20',
    (1, (3, 3, 3), 64): 'slimclr_resnet20x4',
}
"""Expansion of a block, blocks in each stage and channels of the stem -> name in timm's registry."""

_BLOCK = re.compile(r'^features\.(\d+)\.')
_SWITCHED = re.compile(r'\.(?:bn|linears)\.(\d+)\.')
_STAGE_BLOCK = re.compile(r'^layer(\d+)\.(\d+)\.')
_NORM = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')

Shapes = Mapping[str, Sequence[int]]


def backbone_name(reference: str, stages: Sequence[int] = RESNET50_STAGES, keys: Sequence[str] = DESCENDING) -> str:
    """Our name of a backbone's or switchable probe's tensor, from the authors' without `module.` and encoder prefix.

    `features.3.shortcut.1.bn.2.weight` -> `layer2.0.downsample.1.w050.weight`.

    Args:
        reference: The authors' name.
        stages: Blocks in each stage, which theirs number through.
        keys: Keys of the widths in the checkpoint's order.
    """

    def block(match: re.Match[str]) -> str:
        index = int(match[1])
        starts = (0, *accumulate(stages))
        stage = max(i for i, start in enumerate(starts) if start <= index)
        return f'layer{stage + 1}.{index - starts[stage]}.'

    name = _BLOCK.sub(block, reference).replace('.shortcut.', '.downsample.')
    return _SWITCHED.sub(lambda match: f'.{keys[int(match[1])]}.', name)


@dataclass(frozen=True)
class Layout:
    """The network that a file of tensors belongs to, in this package's names.

    Args:
        expansion: Output channels of a block over its inner ones: 4 for bottlenecks, 1 for basic blocks.
        stages: Blocks in each stage.
        stem: Channels of the first convolution.
        in_chans: Channels of the images.
        widths: Widths with a normalisation of their own, in descending order; none in a dense network's file.
        num_classes: Classes of its head; 0 without one.
        head: `switchable`, `slimmable` (or dense), or `none`.
        overlap: Whether sub-networks share channels with each other, or only with the largest.
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
        """Channels of the first convolution at width 1.0, as far as the widths tell."""
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
    """Tell the network from its tensors' names and shapes.

    Raises:
        InputError: There is no first convolution, or no stage.
    """
    blocks: dict[int, int] = {}
    for name in shapes:
        if match := _STAGE_BLOCK.match(name):
            stage = int(match[1])
            blocks[stage] = max(blocks.get(stage, 0), int(match[2]) + 1)
    if 'conv1.weight' not in shapes or not blocks:
        raise InputError('conv1.weight and layer1 are missing: these are not the tensors of a ResNet')
    if len(shapes['conv1.weight']) != 4:
        raise InputError(f'conv1.weight has shape {list(shapes["conv1.weight"])}, not that of a convolution')
    keys = {key for name in shapes if not name.startswith('fc.') and (key := switched_key(name))}
    heads = [name for name in shapes if name.startswith('fc.') and name.endswith('.weight')]
    return Layout(
        expansion=4 if 'layer1.0.conv3.weight' in shapes else 1,
        stages=tuple(blocks.get(stage, 0) for stage in range(1, max(blocks) + 1)),
        stem=shapes['conv1.weight'][0],
        in_chans=shapes['conv1.weight'][1],
        widths=tuple(sorted(map(key_width, keys), reverse=True)),
        num_classes=(*shapes[heads[0]], 0)[0] if heads else 0,
        head='none' if not heads else 'slimmable' if heads == ['fc.weight'] else 'switchable',
        overlap=DISJOINT not in shapes,
    )


def check_complete(shapes: Shapes) -> Layout:
    """Check that the tensors are those of one whole slimmable backbone with shapes that agree; a head may be there.

    Raises:
        InputError: A tensor is missing, unexpected or misshapen; the message names it.
    """
    layout = layout_of(shapes)
    expected = {**_backbone_shapes(layout, shapes['conv1.weight']), **_head_shapes(layout, shapes)}
    if problems := differences(expected, shapes):
        raise InputError(f'not {layout}: {shorten(problems)}')
    return layout


def differences(expected: Shapes, found: Shapes) -> list[str]:
    """What is missing, not expected or misshapen, each a few words that name the tensor."""
    return [
        *(f'{name} is missing' for name in expected if name not in found),
        *(f'{name} is not expected' for name in found if name not in expected),
        *(
            f'{name} has shape {list(found[name])}, not {list(shape)}'
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != tuple(shape)
        ),
    ]


def _backbone_shapes(layout: Layout, conv1: Sequence[int]) -> dict[str, tuple[int, ...]]:
    largest = max(layout.widths, default=1.0)
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, channels: int, inputs: int, kernel: int) -> None:
        shape = (scale_channels(channels, largest), scale_channels(inputs, largest), kernel, kernel)
        shapes[f'{name}.weight'] = shape

    def norm(name: str, channels: int) -> None:
        for width in layout.widths:
            for leaf in _NORM:
                shape = () if leaf == 'num_batches_tracked' else (scale_channels(channels, width),)
                shapes[f'{name}.{width_key(width)}.{leaf}'] = shape

    inputs = layout.full_stem
    if not layout.overlap:
        shapes[DISJOINT] = (len(layout.widths),)
    shapes['conv1.weight'] = tuple(conv1)
    norm('bn1', inputs)
    for stage, count in enumerate(layout.stages):
        planes = layout.full_stem * 2**stage
        outputs = planes * layout.expansion
        for block in range(count):
            name = f'layer{stage + 1}.{block}'
            kernels = (1, 3, 1) if layout.expansion > 1 else (3, 3)
            sizes = (inputs, planes, planes, outputs) if layout.expansion > 1 else (inputs, planes, outputs)
            for i, kernel in enumerate(kernels, start=1):
                conv(f'{name}.conv{i}', sizes[i], sizes[i - 1], kernel)
                norm(f'{name}.bn{i}', sizes[i])
            if block == 0 and (stage > 0 or inputs != outputs):
                conv(f'{name}.downsample.0', outputs, inputs, 1)
                norm(f'{name}.downsample.1', outputs)
            inputs = outputs
    return shapes


def _head_shapes(layout: Layout, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    if layout.head == 'none':
        return {}
    features = layout.full_stem * 2 ** (len(layout.stages) - 1) * layout.expansion
    widths = layout.widths or (1.0,)
    if layout.head == 'slimmable':
        sizes = {'fc': scale_channels(features, widths[0])}
    else:
        sizes = {f'fc.{width_key(width)}': scale_channels(features, width) for width in widths}
    # Some kinds of pooling give twice as many features.
    twice = all((*shapes.get(f'{name}.weight', (2 * size,)), 0)[-2] == 2 * size for name, size in sizes.items())
    return {
        f'{name}.{leaf}': (layout.num_classes, size * (1 + twice)) if leaf == 'weight' else (layout.num_classes,)
        for name, size in sizes.items()
        for leaf in ('weight', 'bias')
    }
