"""What an evaluation leaves on disk, for tables and comparisons: accuracies by width, and how they were measured."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slimclr_hub.errors import InputError
from slimclr_hub.files import write_text

RESULT = 'result.json'


@dataclass(frozen=True)
class EvalResult:
    """Accuracies of one network at several widths by one protocol.

    Args:
        kind: `linear` or `knn`.
        protocol: How it was measured, in a few words for a table.
        network: Name or folder of the network.
        top1: Width -> top-1 accuracy in percent.
        top5: Width -> top-5 accuracy in percent, where it was measured.
        settings: The configuration.
        environment: As `environment` tells.
    """

    kind: str
    protocol: str
    network: str
    top1: Mapping[float, float]
    top5: Mapping[float, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        """Write `result.json` into a folder, which is made if it is not there, and return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / RESULT, json.dumps(asdict(self), indent=2) + '\n')
        return folder / RESULT


def load_result(file: Path) -> EvalResult:
    """Read what `EvalResult.save` wrote.

    Raises:
        InputError: It is not such a file.
    """
    try:
        content = json.loads(file.read_text())
        for name in 'top1', 'top5':
            content[name] = {float(width): value for width, value in content[name].items()}
        return EvalResult(**content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f'{file} is not the result of an evaluation ({error!r})') from error


def results_in(folder: Path) -> list[EvalResult]:
    """All results of evaluations that lie in the folder of a network, in the order of their paths."""
    return [load_result(file) for file in sorted(folder.glob(f'*/{RESULT}'))]
