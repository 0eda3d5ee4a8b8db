"""What is known of a network for a comparison: its cost, and every accuracy that lies in its folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean
from typing import Any

import timm
from timm.models import parse_model_name

from slimclr_hub.data import DataConfig
from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.compare.reported import TABLE_1
from slimclr_hub.evaluate.knn_eval.report import ACCURACIES, read_accuracies
from slimclr_hub.evaluate.result import RESULT, load_result
from slimclr_hub.evaluate.subject import default_output, open_subject
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.cost import WidthFacts, width_facts
from slimclr_hub.settings import RECIPE
from slimclr_hub.train.parse import load_recipe
from slimclr_hub.weights.published import PUBLISHED, Published

IMAGENET = 'ImageNet'
_NAMES_OF_IMAGENET = ('imagenet', 'imagenet-1k', 'imagenet1k', 'ilsvrc2012')
_METRICS = 'metrics.jsonl'
_EVALUATIONS = {'linear': 'linear eval', 'knn': 'k-NN eval'}


@dataclass(frozen=True)
class Measure:
    """Accuracies of one network by one protocol on one data set; only those of the same both compare.

    Args:
        label: The protocol in a word or two.
        protocol: The protocol.
        data: The data set.
        top1: Width -> top-1 accuracy in percent.
        top5: Width -> top-5 accuracy in percent, where measured.
        start: Width -> top-1 accuracy before training, where measured.
        others: The same by other values of the protocol's parameters, from the same evaluation.
        source: Folder of the evaluation within that of the network, if it was one.
        time: When it was made, in UTC and ISO 8601, so that the later is the greater.
        older: Folders of others that differ in nothing that the protocol names, and so had to give way.
    """

    label: str
    protocol: str
    data: str
    top1: Mapping[float, float]
    top5: Mapping[float, float] = field(default_factory=dict)
    start: Mapping[float, float] = field(default_factory=dict)
    others: 'Sequence[Measure]' = ()
    source: str = ''
    time: str = ''
    older: Sequence[str] = ()

    @property
    def key(self) -> tuple[str, str, str]:
        """Equal for what compares."""
        return self.data, self.label, self.protocol


@dataclass(frozen=True)
class Entry:
    """A network in a comparison.

    Args:
        name: What to call it.
        model: The network in eval mode; a published one has random weights, as only its cost is asked for.
        size: Height and width of its images in pixels.
        facts: Parameters and multiply-adds of each width, in descending order.
        measures: Its accuracies.
        speed: Width -> images per second, if measured.
        spread: Interquartile range of the repetitions as a share of their median, for the width where it is largest.
    """

    name: str
    model: SlimmableResNet
    size: int
    facts: Sequence[WidthFacts]
    measures: Sequence[Measure]
    speed: Mapping[float, float] = field(default_factory=dict)
    spread: float = 0.0


def read_entries(networks: Sequence[str]) -> list[Entry]:
    """Read what is known of networks that are to be compared.

    Args:
        networks: Folders of runs and networks, and names of published ones.

    Raises:
        InputError: One of them is none of these, a run has no result yet, or there is no accuracy to compare it by.
    """
    networks = [network.removeprefix('local-dir:') for network in networks]
    if len(set(networks)) != len(networks):
        raise InputError(f'{", ".join(networks)}: one network is there twice; name each once')
    last = [Path(network).name if Path(network).is_dir() else network for network in networks]
    names = last if len(set(last)) == len(last) else networks
    entries = [read_entry(network, name) for network, name in zip(networks, names, strict=True)]
    for network, entry in zip(networks, entries, strict=True):
        if not entry.measures:
            raise InputError(
                f'{network} has no accuracy to compare; measure one: recipes/knn_eval.py --network {network}'
            )
    return _alike(entries)


def read_entry(network: str, name: str) -> Entry:
    """Read what is known of one network, be it no accuracy at all.

    Raises:
        InputError: As in `read_entries`.
    """
    network = network.removeprefix('local-dir:')
    folder = Path(network)
    if folder.is_dir() and not any((folder / file).is_file() for file in (RECIPE, 'config.json')):
        raise InputError(f'{network} is neither a run, it has no {RECIPE}, nor a network, it has no config.json')
    published = _published(network)
    # Of a published one the accuracies are known, and cost and speed need no weights.
    model = open_subject(network).model if published is None else timm.create_model(published.name).eval()
    assert isinstance(model, SlimmableResNet)
    measures = [] if published is None else [_reported(published)]
    measures += _while_training(folder, model.widths) if (folder / RECIPE).is_file() else []
    measures += [_evaluated(file) for file in sorted(default_output(network, '-').parent.glob(f'*/{RESULT}'))]
    measures = _newest(measures)
    size = model.pretrained_cfg['input_size'][-1]
    return Entry(name, model, size, width_facts(model, size), measures)


def _published(network: str) -> Published | None:
    if Path(network).exists() or '/' in network:
        return None
    _, name = parse_model_name(network)
    return next((published for published in PUBLISHED.values() if published.name == name), None)


def _reported(published: Published) -> Measure:
    reported = published.reported
    return Measure(
        'linear, reported',
        TABLE_1,
        IMAGENET,
        {width: of.top1 for width, of in reported.items()},
        {width: of.top5 for width, of in reported.items()},
    )


def _evaluated(file: Path) -> Measure:
    result = load_result(file)
    data = result.settings.get('data')
    name = data_name(data) if isinstance(data, Mapping) else 'unknown data'
    label = _EVALUATIONS.get(result.kind, result.kind)
    written = datetime.fromtimestamp(file.stat().st_mtime, timezone.utc).isoformat(timespec='microseconds')
    time = result.environment.get('time', written)
    measure = Measure(label, result.protocol, name, result.top1, result.top5, source=file.parent.name, time=time)
    if not (file.parent / ACCURACIES).is_file():
        return measure
    return replace(
        measure,
        others=[
            replace(measure, protocol=protocol, top1=accuracy.top1, top5=accuracy.top5)
            for protocol, accuracy in read_accuracies(file.parent / ACCURACIES).items()
        ],
    )


def _newest(measures: Sequence[Measure]) -> list[Measure]:
    """Measures of which no two have the same key: of those that have, the newest, which names the others."""
    of: dict[tuple[str, str, str], list[Measure]] = {}
    for measure in measures:
        of.setdefault(measure.key, []).append(measure)
    found = []
    for several in of.values():
        *older, newest = sorted(several, key=lambda measure: measure.time)
        sources = [name for each in older for name in (*each.older, each.source)]
        found.append(replace(newest, older=(*newest.older, *sources)))
    return found


def _alike(entries: Sequence[Entry]) -> list[Entry]:
    """One k and tau for all k-NN evaluations on a data set, where they share any: the best in the mean.

    Each evaluation names its own best, and two networks would stand in two columns.
    """
    chosen: dict[tuple[str, str], str] = {}
    for place in {of.key[:2] for entry in entries for of in entry.measures if of.others}:
        several = [of for entry in entries for of in entry.measures if of.others and of.key[:2] == place]
        means: dict[str, list[float]] = {}
        for other in (other for of in several for other in of.others):
            means.setdefault(other.protocol, []).append(mean(other.top1.values()))
        common = [protocol for protocol, values in means.items() if len(values) == len(several)]
        if common:
            chosen[place] = max(common, key=lambda protocol: mean(means[protocol]))

    def choose(measure: Measure) -> Measure:
        protocol = chosen.get(measure.key[:2])
        found = next((other for other in measure.others if other.protocol == protocol), measure)
        return replace(found, older=measure.older)

    # Evaluations of one network that had a best k each may have the same now.
    return [replace(entry, measures=_newest([choose(measure) for measure in entry.measures])) for entry in entries]


def _while_training(folder: Path, widths: Sequence[float]) -> list[Measure]:
    """The last accuracies in metrics.jsonl, and the first beside them."""
    config = load_recipe(folder / RECIPE)
    images = f'{_images(config.knn.bank)}, while training'
    protocols = {
        'knn': ('k-NN', f'k-NN, k={config.knn.k}, tau={config.knn.temperature:g}, {images}'),
        'linear': ('linear', f'logistic regression, {images}'),
        'top1': ('top-1', "the network's own classifier, while training"),
    }
    records = _evaluations(folder / _METRICS)
    measures = []
    for kind, (label, protocol) in protocols.items():
        found = [
            {width: record[f'{kind}/{width:g}'] for width in widths if f'{kind}/{width:g}' in record}
            for record in records
        ]
        found = [accuracies for accuracies in found if accuracies]
        if found:
            start = found[0] if len(found) > 1 else {}
            measures.append(Measure(label, protocol, data_name(vars(config.data)), found[-1], start=start))
    return measures


def _images(bank: int | None) -> str:
    return 'all training images' if bank is None else f'at most {bank} training images'


def _evaluations(file: Path) -> list[dict[str, Any]]:
    records = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the line that a kill cut off
            continue
        if record.get('kind') == 'eval':
            records.append(record)
    return records


def data_name(data: Mapping[str, Any] | DataConfig) -> str:
    """Name of a data set in a table, from the configuration of images."""
    values = vars(data) if isinstance(data, DataConfig) else data
    name, root = str(values.get('name')), values.get('root')
    if name in ('folder', 'wds/') and root:
        name = Path(root).resolve().name
    return IMAGENET if name.rpartition('/')[2].lower() in _NAMES_OF_IMAGENET else name
