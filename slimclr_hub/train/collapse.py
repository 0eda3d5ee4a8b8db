"""Signs that a run has collapsed: all images get one embedding, and the network learns no more."""

from collections.abc import Mapping
from math import log
from statistics import mean

from slimclr_hub.train.config import PretrainConfig

_NEAR, _NEAR_IN_A_LINE = 0.01, 0.1  # nats from chance, of an epoch's mean and of each line in it
_LEAST_RANK = 1.1  # of random networks it is several times this


class CollapseWatch:
    """Tells when widths collapse, once until they have recovered; it looks at no epoch that ends in warm-up.

    A width has collapsed if its loss is that of chance in the last quarter of an epoch's lines in the log, to which it
    may have risen in the course of it, or if the effective rank of its features is about 1. `loss` names the loss in
    the log; None watches the rank alone.
    """

    def __init__(self, config: PretrainConfig, loss: str | None) -> None:
        self._config = config
        self._loss = loss
        self._lines: list[Mapping[str, float]] = []
        self._collapsed: set[float] = set()

    def add(self, line: Mapping[str, float]) -> None:
        """Add a line of the log, with the loss of each trained width as `info_nce/0.5`."""
        self._lines.append(line)

    def after(self, epoch: int, candidates: int, ranks: Mapping[float, float]) -> dict[float, str]:
        """Return new signs by width after `epoch`, whose lines have been added, and forget the lines.

        Chance is ln(`candidates`). `ranks` are those that were measured.
        """
        lines, self._lines = self._lines, []
        if epoch - 0.25 < self._config.optim.warmup_epochs:
            return {}
        signs: dict[float, str] = {}
        for width in self._config.model.widths:
            found = []
            losses = [line[key] for line in lines if (key := f'{self._loss}/{width:g}') in line]
            losses = losses[len(losses) * 3 // 4 :]
            away = [abs(loss - log(candidates)) for loss in losses] if losses else [_NEAR_IN_A_LINE]
            if max(away) < _NEAR_IN_A_LINE and abs(mean(losses) - log(candidates)) < _NEAR:
                found.append(f'{self._loss} {mean(losses):.3f} is at chance, ln {candidates} = {log(candidates):.3f}')
            if any(f'loss/{width:g}' in line for line in lines) and not ranks.get(width, 2) >= _LEAST_RANK:
                found.append(f'effective rank {ranks[width]:.2f}')
            if found:
                signs[width] = ' and '.join(found)
        new = {width: sign for width, sign in signs.items() if width not in self._collapsed}
        self._collapsed = set(signs)
        return new

    def warning(self, epoch: int, signs: Mapping[float, str]) -> str:
        """One line with the `signs` by width and what to change."""
        optim = self._config.optim
        listed = '; '.join(f'width {width:g}: {sign}' for width, sign in signs.items())
        slowly = f', or method.slow_start_epochs, now {self._config.slow_start:g}'
        return (
            f'Warning: epoch {epoch}: the network collapses, and tells images no longer apart ({listed}). Start again '
            f'with a lower optim.lr, now {optim.lr:g}, or more optim.warmup_epochs, now {optim.warmup_epochs:g}'
            + (slowly if len(self._config.model.widths) > 1 else '')
        )
