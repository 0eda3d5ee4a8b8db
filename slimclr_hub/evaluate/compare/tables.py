"""Tables of a comparison: a row for each network and width, a column for each protocol."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

from slimclr_hub.evaluate.compare.entries import Entry
from slimclr_hub.evaluate.reported import REPORTED, REPORTED_DETECTION, TABLE_1, TABLE_2, ReportedNetwork
from slimclr_hub.models.cost import WidthFacts
from slimclr_hub.runs.result import RANDOM_WEIGHTS, RAW_PIXELS, RESULT, Protocol, Result
from slimclr_hub.runs.tables import TextTable
from slimclr_hub.text import human

_STEADY = 0.2  # spread of repetitions from which on a speed is not reliable
_NEAR = 1.5  # ratio of multiply-adds within which a reported network is of such a cost


def comparison_tables(entries: Sequence[Entry], batch_size: int, hardware: str) -> list[TextTable]:
    """Tables of networks, one for each data set; networks without any accuracy stand in the first one.

    Speed was measured by `batch_size` images at a time on the machine `hardware`.
    """
    sets = list(dict.fromkeys(protocol.data for entry in entries for protocol in entry.results))
    tables = []
    for i, data in enumerate(sets or [None]):
        shown = [
            entry
            for entry in entries
            if any(protocol.data == data for protocol in entry.results) or (i == 0 and not entry.results)
        ]
        tables.append(_table(shown, data, len(entries) == 1, batch_size, hardware))
    if len(sets) > 1:
        notes = [*tables[-1].notes, 'Accuracies on different data sets do not compare.']
        tables[-1] = replace(tables[-1], notes=notes)
    return tables


def reported_networks(entries: Sequence[Entry]) -> list[tuple[ReportedNetwork, list[float]]]:
    """Networks of the paper's table 1 that cost about as much as some to compare, and their widths that do.

    All are returned if there are none to compare. Networks that are among those to compare are left out.
    """
    costs = [fact.multiply_adds for entry in entries for fact in entry.facts]
    names = {name for entry in entries for name in (entry.name, *entry.networks)}
    found = []
    for network in REPORTED:
        widths = [
            width
            for width, (_, multiply_adds) in network.costs.items()
            if not costs or min(costs) / _NEAR <= multiply_adds <= max(costs) * _NEAR
        ]
        if widths and network.result.network not in names:
            found.append((network, widths))
    return found


def reported_tables(entries: Sequence[Entry]) -> list[TextTable]:
    """Rows of table 1 of the paper that cost about as much as the networks; without networks, all of tables 1 and 2."""
    rows = [
        (
            network.method,
            network.backbone,
            f'{width:g}' if len(network.costs) > 1 else '-',
            network.teacher or '-',
            str(network.epochs or '-'),
            *(_rounded(cost) for cost in network.costs[width]),
            f'{network.result.top1[width]:.1f}',
            f'{network.result.top5[width]:.1f}' if width in network.result.top5 else '-',
        )
        for network, widths in reported_networks(entries)
        for width in widths
    ]
    notes = ['Reported by the paper, not measured here; cost as rounded there, with a classifier of 1000 classes.']
    if entries:
        notes.append(
            'Only networks of about the cost of those above; --reported alone shows all. These compare with linear '
            'evaluation on ImageNet, switchable and augmented, and with no other accuracy.'
        )
    costs = ('parameters', 'multiply-adds')
    headers = ['method', 'backbone', 'width', 'teacher', 'epochs', *costs, 'top-1', 'top-5']
    first = TextTable(f'Reported: {TABLE_1.data}, {TABLE_1}', headers, rows, notes, names=4)
    if entries:
        return [first]
    detection = [
        (
            row.method,
            row.backbone,
            '-' if row.width is None else f'{row.width:g}',
            _rounded(row.parameters),
            f'{row.box_ap:.1f}',
            f'{row.mask_ap:.1f}',
        )
        for row in REPORTED_DETECTION
    ]
    headers = ['pre-training', 'backbone', 'width', costs[0], 'box AP', 'mask AP']
    notes = ['Reported by the paper, not measured here.']
    return [first, TextTable(f'Reported: {TABLE_2}', headers, detection, notes, names=3)]


_CSV = (
    *('model', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'img_size', 'crop_pct', 'interpolation'),
    *('infer_samples_per_sec', 'infer_gmacs'),
    *('width', 'data', 'protocol', 'top1_std', 'start', 'networks', 'test_images', 'rank'),
)
"""Columns of timm's files of results, those of its benchmarks that are measured here, and our own."""


def csv_text(entries: Sequence[Entry], reported: bool) -> str:
    """All numbers as CSV, a row for each network, width and protocol; `reported` adds those of `reported_networks`.

    Columns are called as in the files of results of timm, with accuracies in percent, `param_count` in millions and
    `infer_gmacs` in 10^9 multiply-adds.
    """
    file = io.StringIO()
    writer = csv.DictWriter(file, _CSV, restval='', lineterminator='\n')
    writer.writeheader()
    for entry in entries:
        look = getattr(entry.model, 'pretrained_cfg', None) or {}
        about = {
            'model': entry.name,
            'img_size': entry.size,
            **{key: look[key] for key in ('crop_pct', 'interpolation') if look.get(key) is not None},
        }
        for protocol in entry.results or [None]:
            for fact in entry.facts:
                cost = {**about, **_costs(fact.width, fact.parameters, fact.multiply_adds)}
                if fact.width in entry.speed:
                    cost['infer_samples_per_sec'] = entry.speed[fact.width]
                if protocol is None:
                    writer.writerow(cost)
                elif found := entry.values(protocol, 'values', fact.width):
                    several = {
                        kind: mean(values)
                        for kind in ('top1', 'top5', 'start', 'rank')
                        if (values := entry.values(protocol, kind, fact.width))
                    }
                    row = {
                        **cost,
                        **_measured(protocol, several.pop('top1', None), several.pop('top5', None)),
                        **several,
                    }
                    row['networks'] = len(found)
                    if row['top1'] != '':
                        row['top1_std'] = stdev(found) if len(found) > 1 else ''
                        row['test_images'] = entry.results[protocol][0].images or ''
                    writer.writerow(row)
    protocols = list(dict.fromkeys(protocol for entry in entries for protocol in entry.results))
    for name, of in raw_pixels_of(entries, protocols).items():
        for protocol, result in of.items():
            row = _measured(protocol, result.top1[1.0], result.top5.get(1.0))
            writer.writerow({'model': name, **row, 'networks': 1, 'test_images': result.images or ''})
    for network, widths in reported_networks(entries) if reported else ():
        for width in widths:
            result, teacher = network.result, f', teacher {network.teacher}' if network.teacher else ''
            row = {**_costs(width, *network.costs[width]), 'model': f'{result.network}{teacher}', 'networks': 1}
            writer.writerow({**row, **_measured(TABLE_1, result.top1[width], result.top5.get(width))})
    return file.getvalue()


def _costs(width: float, parameters: float, multiply_adds: float) -> dict[str, Any]:
    return {'width': width, 'param_count': round(parameters / 1e6, 2), 'infer_gmacs': round(multiply_adds / 1e9, 4)}


def _measured(protocol: Protocol, top1: float | None, top5: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {'data': protocol.data, 'protocol': protocol, 'top1': '', 'top5': ''}
    for name, value in (('top1', top1), ('top5', top5)):
        if value is not None:
            row |= {name: value, f'{name}_err': round(100 - value, 4)}
    return row


def _table(entries: Sequence[Entry], data: str | None, alone: bool, batch_size: int, hardware: str) -> TextTable:
    protocols = list(dict.fromkeys(of for entry in entries for of in entry.results if of.data == data))
    labels = [protocol.label for protocol in protocols]
    headers = ['width', 'parameters', 'multiply-adds']
    headers += ['images/s'] if entries[0].speed else []
    notes = []
    accuracies = [of for of in protocols if of.kind != 'rank']
    for protocol in protocols:
        # One word where it says enough, else all of them.
        header = protocol.label if labels.count(protocol.label) == 1 else str(protocol)
        headers.append(header)
        notes += _notes(entries, protocol, header)
    if len(accuracies) > 1:
        notes.append('Accuracies by different protocols do not compare: look along a column.')
    notes += [
        f'{entry.name}: mean and standard deviation of {len(entry.networks)} runs that differ in their seed alone '
        f'({", ".join(entry.networks)})'
        for entry in entries
        if len(entry.networks) > 1
    ]
    if entries[0].speed:
        notes.append(f'images/s: a batch of {batch_size} at a time, in float32, measured now on {hardware}')
        if (spread := max(entry.spread for entry in entries)) > _STEADY:
            notes.append(f'The machine was busy: repetitions of images/s differ by {100 * spread:.0f} %.')
    rows = []
    for entry in entries:
        for fact in entry.facts:
            row = [] if alone else [entry.name]
            row += [f'{fact.width:g}', human(fact.parameters), human(fact.multiply_adds)]
            row += [f'{entry.speed[fact.width]:,.0f}'] if entry.speed else []
            rows.append([*row, *(_cell(entry, protocol, fact.width) for protocol in protocols)])
    blank = [''] * (len(headers) - len(protocols) - 1)
    for name, width, cells in _baselines(entries, protocols):
        first = [f'{name} {width}'.rstrip()] if alone else [name, width]
        rows.append([*first, *blank, *cells])
    what = 'accuracies (%)' if accuracies else 'effective rank'
    title = 'cost by width' if data is None else f'{what} by width on {data}'
    if alone:
        return TextTable(f'{entries[0].name}: {title}', headers, rows, notes)
    return TextTable(title, ['network', *headers], rows, notes)


def _notes(entries: Sequence[Entry], protocol: Protocol, header: str) -> list[str]:
    results = [result for entry in entries for result in entry.results.get(protocol, ())]
    both = ' (top-1 / top-5)' if any(result.top5 for result in results) else ''
    errors = [result.standard_error(width) or 0 for result in results for width in result.top1]
    counts = {result.images for result in results if result.images}
    sampling = (
        f'; {max(counts)} test images, standard error up to {max(errors):.1f} points' if errors and counts else ''
    )
    if protocol.kind == 'rank':
        sampling = '; 1 where the features of all images are alike, and at most the number of features'
    notes = [(header if header == str(protocol) else f'{header}: {protocol}') + both + sampling]
    return notes + [
        f'{header} of {entry.name}: {entry.notes[protocol]} (how they differ stands in the settings of their {RESULT})'
        for entry in entries
        if protocol in entry.notes
    ]


def _cell(entry: Entry, protocol: Protocol, width: float) -> str:
    found, top5 = (entry.values(protocol, kind, width) for kind in ('values', 'top5'))
    if not found:
        return ''
    cell = _mean(found) + (f' / {_mean(top5)}' if top5 else '')
    return cell + (f' (of {len(found)})' if 1 < len(entry.networks) != len(found) else '')


def _baselines(entries: Sequence[Entry], protocols: Sequence[Protocol]) -> Iterator[tuple[str, str, list[str]]]:
    """Name, width and accuracies of random weights, of networks of one cost together, and of raw pixels."""
    alike: dict[tuple[WidthFacts, ...], list[Entry]] = {}
    for entry in entries:
        if any(entry.values(protocol, 'start', fact.width) for protocol in protocols for fact in entry.facts):
            alike.setdefault(tuple(entry.facts), []).append(entry)
    for facts, of in alike.items():
        name = RANDOM_WEIGHTS if len(alike) == 1 else f'{RANDOM_WEIGHTS} of {of[0].name}'
        for fact in facts:
            start = [[top1 for entry in of for top1 in entry.values(each, 'start', fact.width)] for each in protocols]
            if any(start):
                yield name, f'{fact.width:g}', [_mean(values) if values else '' for values in start]
    for name, found in raw_pixels_of(entries, protocols).items():
        tops = [(*found[of].top1.values(), *found[of].top5.values()) if of in found else () for of in protocols]
        yield name, '', [' / '.join(f'{top:.1f}' for top in each) for each in tops]


def raw_pixels_of(entries: Sequence[Entry], protocols: Sequence[Protocol]) -> dict[str, dict[Protocol, Result]]:
    """Results of raw pixels by these protocols, under a name that tells their size if networks see several."""
    by_size: dict[int, dict[Protocol, Result]] = {}
    for entry in entries:
        for protocol in protocols:
            if protocol in entry.raw_pixels:
                by_size.setdefault(entry.size, {}).setdefault(protocol, entry.raw_pixels[protocol])
    return {RAW_PIXELS if len(by_size) == 1 else f'{RAW_PIXELS}, {size} px': of for size, of in by_size.items()}


def _mean(values: Sequence[float]) -> str:
    return f'{mean(values):.1f}' + (f' ± {stdev(values):.1f}' if len(values) > 1 else '')


def _rounded(cost: float) -> str:
    # No more digits than the paper gives.
    return f'{cost / 1e9:.1f} G' if cost >= 1e9 else f'{cost / 1e6:.1f} M' if cost < 1e8 else f'{cost / 1e6:.0f} M'
