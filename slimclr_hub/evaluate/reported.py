"""Accuracies that the paper reports in tables 1, 2 and 3a: Zhao et al., https://arxiv.org/abs/2209.15525.

Where the paper's cells span several rows, each row here has the value of its own. Numbers of SlimCLR are those of
`weights/published.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from slimclr_hub.runs.result import IMAGENET, Protocol, Result
from slimclr_hub.weights.published import PUBLISHED, WIDTHS, Published

TABLE_1 = Protocol('linear', IMAGENET, source='Zhao et al., table 1')
TABLE_2 = 'Mask R-CNN with FPN, 1x schedule, on COCO val2017, as reported by Zhao et al., table 2'
SLIMMABLE_SUPERVISED = 'supervised slimmable (Yu et al. 2019)'
_INDIVIDUAL = 'MoCo v2, individual networks'
_R50_COSTS = ((25.6e6, 4.1e9), (14.7e6, 2.3e9), (6.9e6, 1.1e9), (2.0e6, 278e6))
_COSTS = {'R-50': _R50_COSTS, 'R-34': ((21.8e6, 3.7e9),), 'R-18': ((11.9e6, 1.8e9),)}


@dataclass(frozen=True)
class ReportedNetwork:
    """A network of table 1, or the networks of one method at the four widths.

    Args:
        method: Method of training.
        backbone: The network, R-50 being ResNet-50.
        result: The accuracies; those of a network of no particular width under 1.0.
        epochs: Epochs of training, or of pre-training without labels, where reported.
        teacher: Teacher that it was distilled from, with its top-1 accuracy, if any.
    """

    method: str
    backbone: str
    result: Result
    epochs: int | None = None
    teacher: str | None = None

    @property
    def costs(self) -> dict[float, tuple[float, float]]:
        """Width -> parameters and multiply-adds for one image of 224x224, as rounded in the table."""
        return dict(zip(self.result.top1, _COSTS[self.backbone], strict=False))

    @property
    def slimmable(self) -> bool:
        """True if one training gave all widths."""
        return self.method.startswith('SlimCLR') or self.method == SLIMMABLE_SUPERVISED


class DetectionRow(NamedTuple):
    """A row of table 2: backbone after a method of pre-training, AP of boxes and of masks; width as in table 1."""

    method: str
    backbone: str
    width: float | None
    parameters: float
    box_ap: float
    mask_ap: float


def _network(
    method: str,
    backbone: str,
    top1: Sequence[float],
    top5: Sequence[float] = (),
    epochs: int | None = None,
    teacher: str | None = None,
) -> ReportedNetwork:
    result = Result(f'{method}, {backbone}', TABLE_1, _by_width(top1), _by_width(top5))
    return ReportedNetwork(method, backbone, result, epochs, teacher)


def _by_width(values: Sequence[float]) -> dict[float, float]:
    return dict(zip(WIDTHS, values, strict=False))


def published_result(published: Published) -> Result:
    """Accuracies that table 1 reports of a published network."""
    top1, top5 = ({width: getattr(of, name) for width, of in published.reported.items()} for name in ('top1', 'top5'))
    return Result(published.name, TABLE_1, top1, top5)


def _slimclr(tag: str) -> ReportedNetwork:
    published = PUBLISHED[tag]
    return ReportedNetwork(
        f'SlimCLR-{published.method}, {published.epochs} epochs', 'R-50', published_result(published), published.epochs
    )


_X2, _R152 = 'R-50x2 (77.3)', 'R-152 (74.1)'
REPORTED: tuple[ReportedNetwork, ...] = (
    _network('supervised', 'R-50', [76.6], [93.2], 100),
    _network('supervised', 'R-34', [75.0]),
    _network('supervised', 'R-18', [72.1]),
    _network(SLIMMABLE_SUPERVISED, 'R-50', [76.0, 74.9, 72.2, 64.4], [92.9, 92.3, 90.8, 86.0], 100),
    _network(_INDIVIDUAL, 'R-50', [67.5], [], 200),
    _network(_INDIVIDUAL, 'R-50', [67.2, 64.3, 58.9, 47.9], [87.8, 85.8, 82.2, 72.8], 200),
    _network('MoCo v2', 'R-50', [71.1], [], 800),
    _network('MoCo v3', 'R-50', [72.8], [], 300),
    _slimclr('mocov2_200e_in1k'),
    _slimclr('mocov2_800e_in1k'),
    _slimclr('mocov3_300e_in1k'),
    _network('SEED', 'R-34', [58.5], [82.6], 200, 'R-50 (67.4)'),
    _network('DisCo', 'R-34', [62.5], [85.4], 200, 'R-50 (67.4)'),
    _network('BINGO', 'R-34', [63.5], [85.7], 200, 'R-50 (67.4)'),
    _network('SEED', 'R-34', [65.7], [86.8], 800, _X2),
    _network('DisCo', 'R-34', [67.6], [88.6], 200, _X2),
    _network('BINGO', 'R-34', [68.9], [88.9], 200, _X2),
    _network('CompRess', 'R-18', [62.6], [], 130, 'R-50 (71.1)'),
    _network('SEED', 'R-18', [63.0], [84.9], 800, _X2),
    _network('DisCo', 'R-18', [65.2], [86.8], 200, _X2),
    _network('BINGO', 'R-18', [65.5], [87.0], 200, _X2),
    _network('SEED', 'R-18', [59.5], [65.5], 200, _R152),  # top-5 as printed; it looks like a slip
    _network('DisCo', 'R-18', [65.5], [86.7], 200, _R152),
    _network('BINGO', 'R-18', [65.9], [87.1], 200, _R152),
)
"""Table 1."""

_SLIMCLR_DETECTION = PUBLISHED['mocov2_800e_in1k'].reported
REPORTED_DETECTION: tuple[DetectionRow, ...] = (
    *(
        DetectionRow(SLIMMABLE_SUPERVISED, 'R-50', width, cost[0], box, mask)
        for width, cost, box, mask in zip(
            WIDTHS, _R50_COSTS, (37.4, 36.7, 34.7, 30.2), (34.9, 34.3, 32.6, 28.6), strict=True
        )
    ),
    DetectionRow('MoCo', 'R-50', None, 25.6e6, 38.5, 35.1),
    DetectionRow('SEED', 'R-34', None, 21.8e6, 38.4, 33.3),
    DetectionRow('BINGO', 'R-18', None, 11.9e6, 32.0, 29.6),
    *(
        DetectionRow('SlimCLR-MoCo v2', 'R-50', width, cost[0], of.box_ap or 0, of.mask_ap or 0)
        for (width, of), cost in zip(_SLIMCLR_DETECTION.items(), _R50_COSTS, strict=True)
    ),
)
"""Table 2."""

_SLIMMABLE_PROBE = (_by_width((64.8, 63.4, 59.6, 53.0)), _by_width((86.1, 85.3, 82.9, 77.8)))
"""Table 3a, one linear layer for all widths: of SlimCLR-MoCo v2, 200 epochs, before slow start, distillation and loss
weights; the switchable probe has 65.6, 64.3, 61.3 and 54.5 there."""


def reported_probe(published: Published | None, head: str) -> Result | None:
    """Accuracies that the paper reports of a network, or of the nearest to it, under a head.

    Table 1 has the `switchable` head for each published network, table 3a the `slimmable` one for one alone.
    """
    if published is None:
        return None
    result, source = published_result(published), 'Zhao et al., table 1'
    distillation: bool | None = True
    if head == 'slimmable':
        if (published.method, published.epochs) != ('MoCo v2', 200):
            return None
        result = Result(published.name, TABLE_1, *_SLIMMABLE_PROBE)
        distillation = None
        source = (
            'Zhao et al., table 3a (of a network without slow start, distillation and loss weights, which this one has)'
        )
    protocol = Protocol('linear', IMAGENET, head=head, features='augmented', distillation=distillation, source=source)
    return replace(result, protocol=protocol)
