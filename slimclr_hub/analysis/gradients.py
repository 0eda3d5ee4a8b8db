"""Gradient imbalance and gradient direction divergence of runs (paper, section 3.2, figures 3 and 4)."""

from collections.abc import Sequence
from dataclasses import dataclass

from slimclr_hub.analysis.entry import Analysis, folders_of, on_one_process


@dataclass(frozen=True)
class GradientsConfig:
    """How gradients are analysed.

    Args:
        output: Folder of figures and data; `analysis` in the folder of the first run where null.
        batches: Batches to average over at each checkpoint of a run that kept no records.
    """

    output: str | None = None
    batches: int = 1


def analyse_gradients(runs: Sequence[str], config: GradientsConfig) -> None:
    """Not yet."""
    on_one_process()
    print(folders_of(runs), config)


GRADIENTS = Analysis(GradientsConfig, analyse_gradients, 'RUN [RUN ...]', 'Gradient imbalance and divergence of runs.')
