"""The way of a network's weights through training, in the plane in which they move most (paper, section 4.4)."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from slimclr_hub.analysis.landscape.directions import Directions, Weights, find_directions, moves
from slimclr_hub.analysis.replay import checkpoint_steps, saved_weights
from slimclr_hub.errors import InputError

BACKBONE = 'backbone.'
"""What the names of the trained network's tensors begin with; the head is not part of a trajectory."""

NORMALISATIONS = ('filter', 'none')


@dataclass(frozen=True)
class Trajectory:
    """Weights of a run over training.

    Those are the convolutions (and with supervised training the classifier) of the trained backbone, in contrastive
    methods the one that embeds the queries, at full size: at all widths together. Biases and batch normalisation, which
    each width has of its own, and projection heads are left out.

    Args:
        folder: Folder of the run.
        steps: Optimizer steps after which they were saved, in ascending order.
        steps_per_epoch: Steps of an epoch.
        points: Weights after each, by their names within the backbone.
    """

    folder: Path
    steps: tuple[int, ...]
    steps_per_epoch: int
    points: list[dict[str, Any]]

    @property
    def origin(self) -> Weights:
        """The last weights, from which offsets are taken."""
        return self.points[-1]

    def directions(self, normalise: str) -> Directions:
        """Principal components of the trajectory about its end, and its path along them.

        Args:
            normalise: `filter`, to scale each filter of a component to the norm of the same filter of the last
                weights, or `none`.

        Raises:
            InputError: There are too few points.
        """
        try:
            return find_directions(self.points, self.origin, normalise == 'filter')
        except InputError as error:
            raise InputError(f'{self.folder}: {error}') from error


@dataclass(frozen=True)
class Path2D:
    """A trajectory in its plane, as it is written to disk.

    Args:
        run: Folder of the run.
        steps: Optimizer steps of the points.
        epochs: The same in epochs.
        coordinates: Coordinates of each point along both directions, 0 at the last.
        offsets: Largest distance from the last point along each direction.
        explained: Share of all squared distances from the last point along each principal component.
        captured: Share of them in the plane.
        normalise: As in `Trajectory.directions`.
    """

    run: str
    steps: tuple[int, ...]
    epochs: tuple[float, ...]
    coordinates: tuple[tuple[float, float], ...]
    offsets: tuple[float, float]
    explained: tuple[float, float]
    captured: float
    normalise: str

    def as_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return json.loads(json.dumps(asdict(self)))


def load_trajectory(folder: Path) -> Trajectory:
    """Read the weights of a run from its checkpoints and the snapshots beside them, up to its last checkpoint.

    Raises:
        InputError: There is no checkpoint, or one cannot be read or is of another network.
    """
    checkpoints = checkpoint_steps(folder)
    if not checkpoints:
        raise InputError(f'{folder} has no checkpoint; give a run that has trained')
    last = checkpoints[-1]
    state = json.loads((folder / 'checkpoints' / f'step-{last:08d}' / 'state.json').read_text())
    files = {step: file for step, file in saved_weights(folder).items() if step <= last}
    points = [_read(file) for file in files.values()]
    shapes = [{name: tensor.shape for name, tensor in point.items()} for point in points]
    for file, each in zip(files.values(), shapes, strict=True):
        if each != shapes[-1]:
            raise InputError(f'{file} does not hold the network that {folder} ends with; remove it')
    return Trajectory(folder, tuple(files), state['steps_per_epoch'], points)


def path_of(run: str, trajectory: Trajectory, directions: Directions, normalise: str) -> Path2D:
    """What is told of a trajectory in its plane."""
    return Path2D(
        run=run,
        steps=trajectory.steps,
        epochs=tuple(step / trajectory.steps_per_epoch for step in trajectory.steps),
        coordinates=tuple((a, b) for a, b in directions.coordinates.tolist()),
        offsets=directions.offsets,
        explained=directions.explained,
        captured=directions.captured,
        normalise=normalise,
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        with safe_open(file, 'pt') as tensors:
            names = [name for name in tensors.keys() if name.startswith(BACKBONE)]  # noqa: SIM118, no mapping
            found = {name.removeprefix(BACKBONE): tensors.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise InputError(f'{file} cannot be read ({error}); remove it') from error
    return {name: tensor for name, tensor in found.items() if moves(tensor)}
