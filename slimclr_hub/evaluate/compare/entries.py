"""What is known of a network for a comparison: its cost, and every accuracy that lies in its folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean

import timm
from timm.models import parse_model_name

from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.compare.reported import TABLE_1
from slimclr_hub.evaluate.knn_eval.report import ACCURACIES, read_accuracies
from slimclr_hub.evaluate.result import RESULT, load_result
from slimclr_hub.evaluate.subject import default_output, open_subject
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.cost import WidthFacts, width_facts
from slimclr_hub.runs.result import IMAGENET, METRICS, data_name, results_in
from slimclr_hub.settings import RECIPE
from slimclr_hub.weights.published import PUBLISHED, Published

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
    measures += _while_training(folder) if (folder / RECIPE).is_file() else []
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


def _while_training(folder: Path) -> list[Measure]:
    """The last accuracies in metrics.jsonl, and the first beside them."""
    return [
        Measure(of.protocol.label, str(of.protocol), str(of.protocol.data), of.top1, of.top5, of.start)
        for of in results_in(folder).get(folder / METRICS, ())
    ]
