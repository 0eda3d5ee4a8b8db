"""What the paper's tables 1, 2 and 3a report, of others too: Zhao et al., https://arxiv.org/abs/2209.15525.

Facts alone. Where the paper's cells span several rows, each row here has the value of its own. Numbers of SlimCLR are
those of `weights/published.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from slimclr_hub.weights.published import PUBLISHED, WIDTHS, Reported

TABLE_1 = 'linear evaluation on ImageNet, as reported in table 1 of arXiv:2209.15525'
TABLE_2 = 'Mask R-CNN with FPN, 1x schedule, on COCO val2017, as reported in table 2 of arXiv:2209.15525'


@dataclass(frozen=True)
class ReportedRow:
    """A row of table 1.

    Args:
        method: Method of training.
        backbone: Its network, R-50 being ResNet-50.
        width: Width of the sub-network, for ResNet-50 at several widths.
        teacher: Teacher it was distilled from, with its top-1 accuracy, if any.
        top1: Top-1 accuracy in percent.
        top5: Top-5 accuracy in percent, where reported.
        epochs: Epochs of training, or of pre-training where that is without labels; where reported.
        parameters: Parameters, as rounded there.
        multiply_adds: Multiply-adds for one image of 224x224, as rounded there.
    """

    method: str
    backbone: str
    width: float | None
    teacher: str | None
    top1: float
    top5: float | None
    epochs: int | None
    parameters: float
    multiply_adds: float

    @property
    def series(self) -> str:
        """What it forms a curve with: a slimmable network of one training, or networks of one method."""
        return f'{self.method}, {self.epochs} epochs' if self.method.startswith('SlimCLR') else self.method

    @property
    def slimmable(self) -> bool:
        """Whether one training gave all widths of its series."""
        return self.method.startswith('SlimCLR') or self.method == SLIMMABLE_SUPERVISED


@dataclass(frozen=True)
class DetectionRow:
    """A row of table 2.

    Args:
        method: Method of pre-training.
        backbone: Its network.
        width: Width of the sub-network, for ResNet-50 at several widths.
        parameters: Parameters of the backbone during pre-training, as rounded there.
        box_ap: AP of boxes.
        mask_ap: AP of masks.
    """

    method: str
    backbone: str
    width: float | None
    parameters: float
    box_ap: float
    mask_ap: float


SLIMMABLE_SUPERVISED = 'supervised slimmable (Yu et al. 2019)'
_R50, _R34, _R18 = (25.6e6, 4.1e9), (21.8e6, 3.7e9), (11.9e6, 1.8e9)
_COST = dict(zip(WIDTHS, (_R50, (14.7e6, 2.3e9), (6.9e6, 1.1e9), (2.0e6, 278e6)), strict=True))
_X2, _R152 = 'R-50x2 (77.3)', 'R-152 (74.1)'
_INDIVIDUAL = 'MoCo v2, individual networks'


def _widths(method: str, epochs: int, accuracies: tuple[tuple[float, float], ...]) -> tuple[ReportedRow, ...]:
    return tuple(
        ReportedRow(method, 'R-50', width, None, top1, top5, epochs, *_COST[width])
        for width, (top1, top5) in zip(WIDTHS, accuracies, strict=True)
    )


def _slimclr() -> tuple[ReportedRow, ...]:
    published = [PUBLISHED[tag] for tag in ('mocov2_200e_in1k', 'mocov2_800e_in1k', 'mocov3_300e_in1k')]
    return tuple(
        row
        for network in published
        for row in _widths(
            f'SlimCLR-{network.method}',
            network.epochs,
            tuple((network.reported[width].top1, network.reported[width].top5) for width in WIDTHS),
        )
    )


REPORTED: tuple[ReportedRow, ...] = (
    ReportedRow('supervised', 'R-50', None, None, 76.6, 93.2, 100, *_R50),
    ReportedRow('supervised', 'R-34', None, None, 75.0, None, None, *_R34),
    ReportedRow('supervised', 'R-18', None, None, 72.1, None, None, *_R18),
    *_widths(SLIMMABLE_SUPERVISED, 100, ((76.0, 92.9), (74.9, 92.3), (72.2, 90.8), (64.4, 86.0))),
    ReportedRow(_INDIVIDUAL, 'R-50', None, None, 67.5, None, 200, *_R50),
    *_widths(_INDIVIDUAL, 200, ((67.2, 87.8), (64.3, 85.8), (58.9, 82.2), (47.9, 72.8))),
    ReportedRow('MoCo v2', 'R-50', None, None, 71.1, None, 800, *_R50),
    ReportedRow('MoCo v3', 'R-50', None, None, 72.8, None, 300, *_R50),
    *_slimclr(),
    ReportedRow('SEED', 'R-34', None, 'R-50 (67.4)', 58.5, 82.6, 200, *_R34),
    ReportedRow('DisCo', 'R-34', None, 'R-50 (67.4)', 62.5, 85.4, 200, *_R34),
    ReportedRow('BINGO', 'R-34', None, 'R-50 (67.4)', 63.5, 85.7, 200, *_R34),
    ReportedRow('SEED', 'R-34', None, _X2, 65.7, 86.8, 800, *_R34),
    ReportedRow('DisCo', 'R-34', None, _X2, 67.6, 88.6, 200, *_R34),
    ReportedRow('BINGO', 'R-34', None, _X2, 68.9, 88.9, 200, *_R34),
    ReportedRow('CompRess', 'R-18', None, 'R-50 (71.1)', 62.6, None, 130, *_R18),
    ReportedRow('SEED', 'R-18', None, _X2, 63.0, 84.9, 800, *_R18),
    ReportedRow('DisCo', 'R-18', None, _X2, 65.2, 86.8, 200, *_R18),
    ReportedRow('BINGO', 'R-18', None, _X2, 65.5, 87.0, 200, *_R18),
    ReportedRow('SEED', 'R-18', None, _R152, 59.5, 65.5, 200, *_R18),  # top-5 as printed; it looks like a slip
    ReportedRow('DisCo', 'R-18', None, _R152, 65.5, 86.7, 200, *_R18),
    ReportedRow('BINGO', 'R-18', None, _R152, 65.9, 87.1, 200, *_R18),
)
"""Table 1."""


def _detectors() -> tuple[DetectionRow, ...]:
    rows = []
    for width, reported in PUBLISHED['mocov2_800e_in1k'].reported.items():
        assert reported.box_ap is not None
        assert reported.mask_ap is not None
        parameters, _ = _COST[width]
        rows.append(DetectionRow('SlimCLR-MoCo v2', 'R-50', width, parameters, reported.box_ap, reported.mask_ap))
    return tuple(rows)


REPORTED_DETECTION: tuple[DetectionRow, ...] = (
    *(
        DetectionRow(SLIMMABLE_SUPERVISED, 'R-50', width, _COST[width][0], box, mask)
        for width, box, mask in zip(WIDTHS, (37.4, 36.7, 34.7, 30.2), (34.9, 34.3, 32.6, 28.6), strict=True)
    ),
    DetectionRow('MoCo', 'R-50', None, _R50[0], 38.5, 35.1),
    DetectionRow('SEED', 'R-34', None, _R34[0], 38.4, 33.3),
    DetectionRow('BINGO', 'R-18', None, _R18[0], 32.0, 29.6),
    *_detectors(),
)
"""Table 2."""

REPORTED_SLIMMABLE_PROBE: Mapping[float, Reported] = {
    1.0: Reported(64.8, 86.1),
    0.75: Reported(63.4, 85.3),
    0.5: Reported(59.6, 82.9),
    0.25: Reported(53.0, 77.8),
}
"""Table 3a, one linear layer for all widths: of SlimCLR-MoCo v2, 200 epochs, before slow start, distillation and loss
weights; the switchable probe has 65.6, 64.3, 61.3 and 54.5 there."""
