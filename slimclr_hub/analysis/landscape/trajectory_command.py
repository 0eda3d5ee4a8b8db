"""`analyze.py trajectory`: the way of runs' weights through training (paper, figure 5 b and d)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from slimclr_hub.analysis.entry import Analysis, folders_of, on_one_process
from slimclr_hub.analysis.files import check_settings, data_file, labels_of, stem_of
from slimclr_hub.analysis.landscape.figure import Panel, draw_planes
from slimclr_hub.analysis.landscape.trajectory import NORMALISATIONS, Path2D, load_trajectory, path_of
from slimclr_hub.files import write_text
from slimclr_hub.runs.tables import print_table
from slimclr_hub.settings import one_of


@dataclass(frozen=True)
class TrajectoryConfig:
    """How trajectories are shown.

    Args:
        output: Folder of data and figure; `analysis` in the folder of the first run where null.
        normalise: Of the directions in the figure. none: of norm 1, so that coordinates are distances between weights,
            as the paper's offsets have to be; filter: each filter as long as that of the last weights.
    """

    output: str | None = None
    normalise: str = 'none'

    def __post_init__(self) -> None:
        one_of('normalise', self.normalise, NORMALISATIONS)


def analyse_trajectory(runs: Sequence[str], config: TrajectoryConfig) -> None:
    """Write coordinates and figure of the trajectories of runs, and print their offsets."""
    on_one_process()
    folders = folders_of(runs)
    stem = stem_of('trajectory', folders, config.output)
    settings = {'runs': [str(folder) for folder in folders], 'normalise': config.normalise}
    check_settings(data_file(stem), settings)
    paths: list[dict[str, Path2D]] = []
    for folder in folders:
        trajectory = load_trajectory(folder)
        paths.append({how: path_of(str(folder), trajectory, trajectory.directions(how), how) for how in NORMALISATIONS})
    stem.parent.mkdir(parents=True, exist_ok=True)
    found = [{how: path.as_json() for how, path in both.items()} for both in paths]
    write_text(data_file(stem), json.dumps({'settings': settings, 'trajectories': found}, indent=1) + '\n')
    labels = labels_of(folders)
    panels = [Panel(label, both[config.normalise]) for label, both in zip(labels, paths, strict=True)]
    draw_planes(panels, '', stem)
    print_offsets(labels, paths)
    print(f'Figure: {stem}.png\nData: {stem}.json')


def print_offsets(labels: Sequence[str], paths: Sequence[dict[str, Path2D]]) -> None:
    """Print largest offsets along both components, and by how much they exceed the first run's."""
    from rich.table import Table

    table = Table(title='Trajectories: largest offsets from the end, by PCA component')
    for title in 'run', 'points', 'explained (%)', 'offsets', '2nd vs first':
        table.add_column(title, justify='left' if title == 'run' else 'right', no_wrap=True)
    first = paths[0]['none'].offsets[1]
    for label, both in zip(labels, paths, strict=True):
        plain = both['none']
        table.add_row(
            label,
            str(len(plain.steps)),
            ', '.join(f'{100 * share:.1f}' for share in plain.explained),
            ', '.join(f'{offset:.3g}' for offset in plain.offsets),
            '' if both is paths[0] else f'{100 * (plain.offsets[1] / first - 1):+.1f} %',
        )
    print_table(table)
    print('Paper, section 4.4, 2nd: supervised 21.75 alone, 28.49 slimmable (+31.0 %); MoCo 13.26, 18.75 (+41.4 %).')


TRAJECTORY = Analysis(
    TrajectoryConfig, analyse_trajectory, 'RUN [RUN ...]', 'The way of weights through training, and its offsets.'
)
