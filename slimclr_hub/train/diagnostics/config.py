"""What a run records of its gradients and weights, for the analyses of the paper's section 3.2."""

from dataclasses import dataclass

from slimclr_hub.errors import InputError
from slimclr_hub.models.widths import check_widths
from slimclr_hub.settings import at_least


@dataclass(frozen=True)
class DiagnosticsConfig:
    """What a run records of its gradients and weights, for recipes/analyze.py; nothing unless asked for.

    Args:
        every: Optimizer steps from one record of gradient norms (Fig. 3) to the next; 0 for none.
        gradients: Steps from one record of the last linear layer's gradient (Fig. 4) to the next; 0 for none. A record
            is as large as the layer: 1 MiB for mocov2 with a ResNet-50.
        snapshots: Steps from one file of the trained weights (Fig. 5) to the next; 0 for none.
        smallest: Width whose share of the gradient is measured: the narrowest; a quarter of the width where there is
            but one.
    """

    every: int = 0
    gradients: int = 0
    snapshots: int = 0
    smallest: float | None = None

    def __post_init__(self) -> None:
        for name in 'every', 'gradients', 'snapshots':
            at_least(f'diagnostics.{name}', getattr(self, name), 0)
        if self.smallest is not None:
            try:
                check_widths([self.smallest])
            except InputError as error:
                raise InputError(f'diagnostics.smallest {self.smallest:g}: {error}') from error

    @property
    def on(self) -> bool:
        """Whether anything is recorded."""
        return max(self.every, self.gradients, self.snapshots) > 0

    def smallest_of(self, widths: tuple[float, ...], overlap: bool = True) -> float:
        """The width whose share is measured, of a network with `widths`.

        Raises:
            InputError: It is not below the full width, or is none that a network without overlap has channels for.
        """
        full, narrowest = max(widths), min(widths)
        smallest = self.smallest or (narrowest if len(widths) > 1 else round(full / 4, 4))
        if smallest >= full:
            raise InputError(
                f'diagnostics.smallest {smallest:g} is not below the full width {full:g}; give a smaller one'
            )
        if not overlap and smallest not in widths:
            raise InputError(
                f'diagnostics.smallest {smallest:g} is not one of model.widths {list(widths)}, and with model.overlap '
                'false no other has channels; give one of them, or model.overlap true'
            )
        return smallest
