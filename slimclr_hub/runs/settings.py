"""Settings of a job as recorded in its folder, flat as `section.key`, and how two of them differ."""

from dataclasses import asdict
from typing import Any

from slimclr_hub.runs.command_line import plain

RECIPE = 'recipe.yaml'
"""File in a run's folder that holds its configuration."""

PRECISIONS = ('no', 'fp16', 'bf16')


def flatten(config: Any) -> dict[str, Any]:
    """A configuration dataclass as `section.key` -> value."""
    flat: dict[str, Any] = {}
    for name, section in plain(asdict(config)).items():
        flat |= (
            {f'{name}.{key}': value for key, value in section.items()} if isinstance(section, dict) else {name: section}
        )
    return flat
