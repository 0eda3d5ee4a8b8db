"""Networks to compare: their cost and speed, and every accuracy and rank in their folders."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from itertools import takewhile
from pathlib import Path
from statistics import mean, quantiles
from time import perf_counter
from typing import Any

import timm
import torch

from slimclr_hub.errors import InputError
from slimclr_hub.evaluate.network import default_output, folder_of, open_for_test, published_network, shipped_network
from slimclr_hub.evaluate.reported import published_result
from slimclr_hub.images import MAX_IMAGE_SIZE
from slimclr_hub.models import SlimmableResNet
from slimclr_hub.models.cost import WidthFacts, width_facts
from slimclr_hub.models.registry import slimmable_models
from slimclr_hub.runs.result import RAW_PIXELS, Protocol, Result, load, results_in
from slimclr_hub.runs.turns import seconds_of
from slimclr_hub.settings import RECIPE, read_yaml
from slimclr_hub.text import first_line

_REPETITIONS = 7
_LEAST_REPETITIONS = 3
_MOMENT = 0.01  # seconds; shorter forwards are timed several at once
_SEED = re.compile(r'[-_.](seed)?[-_.]?\d*$')

SameRecipe = Callable[[Path, Path], bool]
"""True if two folders are runs of one recipe that differ in nothing but the seed."""


@dataclass(frozen=True)
class Entry:
    """A network in a comparison, or several that differ in nothing but the seed.

    Args:
        name: Name in tables.
        model: The network in eval mode; only its cost and speed count, so it may have random weights.
        size: Height and width of its images in pixels.
        facts: Parameters and multiply-adds of each width, in descending order.
        results: Protocol -> the result of each network.
        notes: Protocol -> remarks on the choice of a result.
        networks: Names of the networks.
        raw_pixels: Protocol -> what raw pixels reach on the same images.
        speed: Width -> images per second, if measured.
        spread: Interquartile range of the repetitions over their median, at the width where it is largest.
    """

    name: str
    model: SlimmableResNet
    size: int
    facts: Sequence[WidthFacts]
    results: Mapping[Protocol, Sequence[Result]]
    notes: Mapping[Protocol, str] = field(default_factory=dict)
    networks: Sequence[str] = ()
    raw_pixels: Mapping[Protocol, Result] = field(default_factory=dict)
    speed: Mapping[float, float] = field(default_factory=dict)
    spread: float = 0.0

    def values(self, protocol: Protocol, kind: str, width: float) -> list[float]:
        """What each network has of `kind`: `values` (of the rank or else top-1), `top1`, `top5`, `rank` or `start`."""
        found = (getattr(result, kind).get(width) for result in self.results.get(protocol, ()))
        return [value for value in found if value is not None]


@dataclass(frozen=True)
class _Measurement:
    """Results of one evaluation, by several values of k and tau if it is a k-NN evaluation; the best one first."""

    results: Sequence[Result]
    source: str
    time: str

    @property
    def place(self) -> Protocol:
        """Equal for measurements of which one k and tau is chosen."""
        return replace(self.results[0].protocol, k=None, temperature=None)


def read_entries(networks: Sequence[str], same_recipe: SameRecipe | None = None, baselines: bool = True) -> list[Entry]:
    """Read cost and accuracies of folders of runs and networks, and of published ones by their names.

    Runs that are of the same recipe by `same_recipe` go into one entry, if it is given. Without `baselines`, what raw
    pixels and random weights reach is left out.

    Raises:
        InputError: One of them is none of these.
    """
    networks = [network.removeprefix('local-dir:') for network in networks]
    if len(set(networks)) != len(networks):
        raise InputError(f'{", ".join(networks)}: one network is there twice; name each once')
    last = [Path(network).name if Path(network).is_dir() else network for network in networks]
    if not networks:
        return []
    names = last if len(set(last)) == len(last) else networks
    models = [_open(network) for network in networks]
    measurements, pixels = zip(*(_measurements(network, baselines) for network in networks), strict=True)
    chosen = _chosen([each for several in measurements for each in several])
    entries = []
    for network, name, (model, size), found, raw in zip(networks, names, models, measurements, pixels, strict=True):
        results, notes = _newest(found, chosen)
        entries.append(Entry(name, model, size, width_facts(model, size), results, notes, [network], raw))
    return entries if same_recipe is None else _merge_seeds(entries, same_recipe)


def _open(network: str) -> tuple[SlimmableResNet, int]:
    """Open a network and tell the size of its images; of a published or unfinished one, with random weights."""
    folder, published = folder_of(network), published_network(network)
    recipe = folder / RECIPE
    if folder.is_dir() and not any(file.is_file() for file in (recipe, folder / 'config.json')):
        raise InputError(f'{network} is neither a run, it has no {RECIPE}, nor a network, it has no config.json')
    if recipe.is_file() and not (folder / 'config.json').is_file():
        try:
            return _unfinished(read_yaml(recipe))
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            raise InputError(f'{recipe} describes no network ({first_line(error)})') from error
    model = timm.create_model(published.name).eval() if published is not None else open_for_test(network)
    assert isinstance(model, SlimmableResNet)
    return model, model.pretrained_cfg['input_size'][-1]


def _unfinished(settings: Any) -> tuple[SlimmableResNet, int]:
    """The network that a recipe describes, with random weights, and the size of its images."""
    of_model, data = settings['model'], settings['data']
    architecture, *_ = of_model['name'].partition('.')
    if architecture not in slimmable_models():
        raise InputError(f'model.name {of_model["name"]!r} is none of {", ".join(slimmable_models())}')
    model = timm.create_model(
        architecture,
        num_classes=settings.get('method', {}).get('num_classes') or 0,
        in_chans=data.get('channels', 3),
        widths=tuple(of_model['widths']),
    )
    assert isinstance(model, SlimmableResNet)
    if not isinstance(data['size'], int) or not 0 < data['size'] <= MAX_IMAGE_SIZE:
        raise InputError(f'data.size is {data["size"]!r}; a size is from 1 to {MAX_IMAGE_SIZE} pixels')
    return model.eval(), data['size']


def _measurements(network: str, baselines: bool) -> tuple[list[_Measurement], dict[Protocol, Result]]:
    """What was measured of a network and, by the same protocols, of raw pixels."""
    published = published_network(network)
    found = [] if published is None else [_Measurement([published_result(published)], '', '')]
    pixels: dict[Protocol, Result] = {}
    folder = default_output(network, '-').parent
    shipped = shipped_network(network)
    files = results_in(folder) | ({} if shipped is None else {shipped.results: load(shipped.results)})
    for file, results in files.items():
        written = datetime.fromtimestamp(file.stat().st_mtime, timezone.utc).isoformat(timespec='microseconds')
        source = '' if file.parent == folder else file.parent.name
        by_place: dict[Protocol, list[Result]] = {}
        for result in results:
            if result.network != RAW_PIXELS:
                own = result if baselines else replace(result, start={})
                by_place.setdefault(replace(result.protocol, k=None, temperature=None), []).append(own)
            elif baselines:
                pixels[result.protocol] = result
        for several in by_place.values():
            found.append(_Measurement(several, source, several[0].environment.get('time', written)))
    return found, pixels


def _chosen(measurements: Sequence[_Measurement]) -> dict[Protocol, Protocol]:
    """Choose one k and tau for all k-NN evaluations on the same images, if they share any: the best in the mean."""
    chosen = {}
    for place in {each.place for each in measurements if len(each.results) > 1}:
        several = [each for each in measurements if each.place == place]
        means: dict[Protocol, list[float]] = {}
        for result in (result for each in several for result in each.results):
            means.setdefault(result.protocol, []).append(result.mean)
        common = [protocol for protocol, values in means.items() if len(values) == len(several)]
        if common:
            chosen[place] = max(common, key=lambda protocol: mean(means[protocol]))
    return chosen


def _newest(
    measurements: Sequence[_Measurement], chosen: Mapping[Protocol, Protocol]
) -> tuple[dict[Protocol, list[Result]], dict[Protocol, str]]:
    """The newest result by each protocol, and a note where there are older ones."""
    found: dict[Protocol, list[tuple[str, str, Result]]] = {}
    for each in measurements:
        wanted = chosen.get(each.place)
        result = next((one for one in each.results if one.protocol == wanted), each.results[0])
        found.setdefault(result.protocol, []).append((each.time, each.source, result))
    results, notes = {}, {}
    for protocol, several in found.items():
        *older, (_, source, newest) = sorted(several, key=lambda one: one[0])
        results[protocol] = [newest]
        if older:
            left_out = ', '.join(name for _, name, _ in older)
            notes[protocol] = f'of {source}, the newest by this protocol; left out: {left_out}'
    return results, notes


def _merge_seeds(entries: Sequence[Entry], same_recipe: SameRecipe) -> list[Entry]:
    merged: list[Entry] = []
    for entry in entries:
        own = folder_of(entry.networks[0])
        for i, other in enumerate(merged):
            folder = folder_of(other.networks[0])
            if all((path / RECIPE).is_file() for path in (folder, own)) and same_recipe(folder, own):
                merged[i] = _merged(other, entry)
                break
        else:
            merged.append(entry)
    return merged


def _merged(first: Entry, second: Entry) -> Entry:
    results = {
        protocol: [*first.results.get(protocol, ()), *second.results.get(protocol, ())]
        for protocol in {**first.results, **second.results}
    }
    shared = takewhile(lambda letters: letters[0] == letters[1], zip(first.name, second.name, strict=False))
    name = _SEED.sub('', ''.join(letter for letter, _ in shared)) or first.name
    pixels = {**second.raw_pixels, **first.raw_pixels}
    networks = [*first.networks, *second.networks]
    return replace(first, name=name, results=results, networks=networks, raw_pixels=pixels, notes={})


@torch.inference_mode()
def measure_speed(entries: Sequence[Entry], batch_size: int, seconds: float = 20) -> list[Entry]:
    """Measure images per second of several networks at every width: inference in float32 on random images.

    Every width of every network takes its turn in each repetition, so that other load on the machine affects all alike.
    The median of seven repetitions counts, or of at least three once `seconds` have passed.

    Raises:
        InputError: The batch does not fit in memory.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device('cpu')
    begun = perf_counter()
    try:
        turns = [
            (i, width, torch.randn(batch_size, entry.model.in_chans, entry.size, entry.size, device=device))
            for i, entry in enumerate(entries)
            for width in entry.model.to(device).widths
        ]
        # The first pass is slower; the second one tells how many forwards fit in a moment.
        calls = [partial(entries[i].model.forward_at, images, width) for i, width, images in turns]
        _ = [seconds_of(call, device=device) for call in calls]
        counts = [int(_MOMENT / seconds_of(call, device=device)) + 1 for call in calls]
        measured: list[list[float]] = [[] for _ in turns]
        for repetition in range(_REPETITIONS):
            if repetition >= _LEAST_REPETITIONS and perf_counter() - begun > seconds:
                break
            for times, call, count in zip(measured, calls, counts, strict=True):
                times.append(seconds_of(call, count, device))
    except (torch.OutOfMemoryError, RuntimeError) as error:  # of a GPU, and of the CPU
        if 'memory' not in str(error):
            raise
        raise InputError(f'a batch of {batch_size} does not fit in memory; give a smaller --batch-size') from error
    result = [replace(entry, speed={}, spread=0.0) for entry in entries]
    for (i, width, _), found in zip(turns, measured, strict=True):
        first, middle, third = quantiles(found, n=4, method='inclusive')
        speed = {**result[i].speed, width: batch_size / middle}
        result[i] = replace(result[i], speed=speed, spread=max(result[i].spread, (third - first) / middle))
    return result
