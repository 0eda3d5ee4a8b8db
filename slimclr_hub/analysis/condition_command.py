"""`analyze.py condition`: whether one slimmable linear layer could serve all widths (paper, Appendix A)."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from slimclr_hub.analysis.entry import Analysis, on_one_process
from slimclr_hub.analysis.files import check_settings, data_file
from slimclr_hub.analysis.linear_condition import Condition, linear_condition, narrower
from slimclr_hub.data import DataConfig
from slimclr_hub.data.loaders import eval_loader
from slimclr_hub.data.sources import HOW_NOT_WHICH
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.features import extract_features
from slimclr_hub.evaluate.subject import data_defaults, default_output, open_subject
from slimclr_hub.files import write_text
from slimclr_hub.runs.figures import line_style, new_figure, save_figure
from slimclr_hub.runs.progress import progress_bar
from slimclr_hub.runs.result import environment
from slimclr_hub.runs.tables import print_table
from slimclr_hub.settings import at_least, one_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = dict[str, dict[float, Condition]]
"""Split -> width -> result."""

_SPLITS = ('train', 'validation')
_HATCHES = ('', '//', '..', 'xx')


@dataclass(frozen=True)
class ConditionConfig:
    """How the condition is measured.

    Args:
        widths: Narrower widths to compare with the full one; all where null.
        images: Images of each split, of a fixed random choice; at least as many as the full width has features. The
            paper takes 2048.
        splits: train, for data.train_split, and validation, for data.val_split.
        ridge: Added to the Gram matrices of the features, as a share of the mean of their diagonal; with 0 features
            have to be independent, as the paper assumes.
        seed: Which images.
        output: Folder of data and figure; `analysis` in the network's own folder where null.
        data: The images: those of the network's run, else ImageNet.
    """

    widths: tuple[float, ...] | None = None
    images: int = 2048
    splits: tuple[str, ...] = _SPLITS
    ridge: float = 0.0
    seed: int = 0
    output: str | None = None
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        at_least('images', self.images, 1)
        at_least('ridge', self.ridge, 0)
        if not self.splits:
            raise InputError('splits is empty; give train, validation or both')
        for split in self.splits:
            one_of('splits', split, _SPLITS)
        if 'validation' in self.splits and self.data.val_split is None:
            raise InputError('data.val_split is null, and splits asks for validation; give --splits "[train]"')


def condition_defaults(argv: Sequence[str]) -> Mapping[str, Any]:
    """The images of the network that is named first.

    Raises:
        InputError: An option comes before it.
    """
    if argv[0].startswith('-'):
        if argv[0] in ('-h', '--help'):
            return {}
        raise InputError(f'{argv[0]} comes before the network; name it first: analyze.py condition NETWORK {argv[0]}')
    return data_defaults([f'--network={argv[0]}'])


def analyse_condition(networks: Sequence[str], config: ConditionConfig) -> None:
    """Write both sides' difference by width and split, its figure, and print a table."""
    on_one_process()
    if len(networks) > 1:
        raise InputError(f'{" ".join(networks)} are {len(networks)} networks; give one')
    network = networks[0]
    stem = (Path(config.output) if config.output else default_output(network, 'analysis')) / 'condition'
    settings = _settings(network, config)
    check_settings(data_file(stem), settings)
    results = measure_condition(network, config)
    stem.parent.mkdir(parents=True, exist_ok=True)
    found = {split: {f'{w:g}': asdict(each) for w, each in widths.items()} for split, widths in results.items()}
    content = {'settings': settings, 'condition': found, 'environment': environment()}
    write_text(data_file(stem), json.dumps(content, indent=1) + '\n')
    draw_condition(results, stem, network)
    print_condition(results, network)
    print(f'Figure: {stem}.png\nData: {stem}.json')


def measure_condition(network: str, config: ConditionConfig) -> Results:
    """Measure the condition on the features of a network.

    Raises:
        InputError: There is no such network, width or split, or features of it are not independent.
    """
    backbone = open_subject(network).model
    widths = narrower(backbone.widths, config.widths)
    backbone.reset_classifier(0)
    accelerator = Accelerator()
    backbone = backbone.to(accelerator.device)
    full = backbone.widths[0]
    results: Results = {}
    for split in config.splits:
        named = config.data.train_split if split == 'train' else config.data.val_split
        assert named is not None
        loader = accelerator.prepare_data_loader(eval_loader(config.data, named, config.images, config.seed))
        batches = _batches(loader, config.images, split)
        features, labels = extract_features(accelerator, backbone, batches, [full, *widths])
        results[split] = {w: linear_condition(features[full], features[w], labels, config.ridge) for w in widths}
    return results


def _batches(loader: Iterable, images: int, split: str) -> Iterator[Any]:
    left = images
    with progress_bar(images, split, show=True) as bar:
        for batch, labels in loader:
            yield batch[:left], labels[:left]
            bar.update(len(batch[:left]))
            left -= len(batch)
            if left <= 0:  # a stream has more than were asked for
                return


def _settings(network: str, config: ConditionConfig) -> dict[str, Any]:
    settings = {'network': network, **asdict(config)}
    del settings['output']
    for name in *HOW_NOT_WHICH, 'batch_size', 'shuffle_buffer':
        del settings['data'][name]  # they change no result
    return settings


def draw_condition(results: Results, file: Path, network: str) -> None:
    """Draw how large both sides and their difference are, and what it costs, by width; a row of panels for each split.

    Args:
        results: Split -> width -> result.
        file: Files to write, without suffix: a PNG and a PDF.
        network: The network.
    """
    save_figure(condition_figure(results, network), file)


def condition_figure(results: Results, network: str) -> 'Figure':
    """The figure that `draw_condition` writes."""
    figure, axes = new_figure(2, len(results), width=5.2, height=3.8)
    for row, (split, by_width) in enumerate(results.items()):
        names = [f'{width:g}' for width in by_width]
        found = list(by_width.values())
        images = f'{found[0].images:,} {"training" if split == "train" else split} images'
        left, right = axes[2 * row], axes[2 * row + 1]
        bars = {'|L|, of the shared layer': 'left', '|R|, of its own': 'right', '|L − R|': 'mean'}  # noqa: RUF001
        _draw_bars(left, names, {label: [getattr(each, name) for each in found] for label, name in bars.items()})
        left.set_ylabel(f'mean of entries\n({images})')
        left.set_ylim(0, 1.35 * max(max(each.left, each.right, each.mean) for each in found))
        bars = {"the full width's layer, sliced": 'shared', 'a layer of its own': 'own', 'the full width': 'full'}
        _draw_bars(right, names, {label: [getattr(each, name) for each in found] for label, name in bars.items()})
        right.set_ylabel(f'accuracy (%) on the same\n{images}')
        right.set_ylim(0, 135)
        right.set_yticks(range(0, 101, 20))
    figure.suptitle(f'Eq. (23), {Path(network).name}', fontsize='medium')
    return figure


def _draw_bars(axis: Any, names: Sequence[str], bars: Mapping[str, Sequence[float]]) -> None:
    thickness = 0.8 / len(bars)
    for i, (label, heights) in enumerate(bars.items()):
        places = [n + (i - (len(bars) - 1) / 2) * thickness for n in range(len(names))]
        axis.bar(
            places,
            heights,
            thickness,
            label=label,
            color=line_style(i)['color'],
            hatch=_HATCHES[i],
            edgecolor='white',
        )
    axis.set_axisbelow(True)
    axis.set_xticks(range(len(names)), names)
    axis.set_xlabel('narrower width')
    axis.legend(fontsize='small')


def print_condition(results: Results, network: str) -> None:
    """Print a row for each split and width."""
    from rich.table import Table

    table = Table(title=f'Eq. (23), L: shared linear layer, R: own ({network})')
    for title in 'split', 'images', 'width', '|L-R|', 'total', '|R|', 'rel.', 'own (%)', 'shared (%)':
        table.add_column(title, justify='left' if title == 'split' else 'right', no_wrap=True)
    for split, by_width in results.items():
        for width, each in by_width.items():
            table.add_row(
                split,
                f'{each.images:,}',
                f'{width:g}',
                f'{each.mean:.3g}',
                f'{each.total:.4g}',
                f'{each.right:.3g}',
                f'{each.relative:.3g}',
                f'{each.own:.1f}',
                f'{each.shared:.1f}',
            )
    print_table(table)
    print('Paper, ResNet-50, width 0.5: mean 1.07, total 1096665.50 (train); 0.88, 903094.19 (validation).')


CONDITION = Analysis(
    ConditionConfig,
    analyse_condition,
    'NETWORK',
    'Whether one slimmable linear layer could serve all widths of a network.',
    condition_defaults,
)
