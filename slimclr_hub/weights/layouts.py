"""Names of tensors in the authors' checkpoints, translated to ours."""

import re
from collections.abc import Sequence
from itertools import accumulate

RESNET50_STAGES = (3, 4, 6, 3)
DESCENDING = ('w100', 'w075', 'w050', 'w025')
"""Keys of the widths in the order in which the authors' pre-training checkpoints number them."""

_BLOCK = re.compile(r'^features\.(\d+)\.')
_SWITCHED = re.compile(r'\.(?:bn|linears)\.(\d+)\.')


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
