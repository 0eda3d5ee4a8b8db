"""Damaged files through the commands that read them: `python -m tests.fuzz --cases 5000` or `make fuzz`.

Each case damages one file by a number and a seed, which repeat it, and runs one command on it in a process of its own,
forked from this one since importing takes seconds. A command may succeed, or end with one line and the exit status of a
mistake; a traceback, more than 2 GiB or 20 seconds, files that stay behind and changed inputs are faults.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from slimclr_hub import cli
from slimclr_hub.files import file_hash
from slimclr_hub.hub.open import open_network
from slimclr_hub.models.cascade import Cascade, FittedCascades
from slimclr_hub.models.resolutions import Pair, Resolutions, statistics_of
from slimclr_hub.runs.command_line import run_script
from slimclr_hub.runs.result import Protocol, Result, save
from slimclr_hub.train.command import parse_pretrain
from slimclr_hub.weights.hashes import state_hash
from tests.hub.files import ROOT, save_small, small_network

MEMORY = 2 << 30  # bytes, beyond those of this process
SECONDS = 20  # of the processor
RECIPE = ROOT / 'recipes' / 'configs' / 'mocov2_resnet20_fashionmnist6k.yaml'
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 0.5, 0.0001, 3, 4096, 10**6, 10**9, 2**63, 10**30, -1e308, float('nan'), float('inf')),
    *('', 'x', '\x1b[2J\x07', 'é', '../../x', 'os.system', '/etc/passwd', 'x' * 5000, 'layer1.0.conv1.weight', '1.0'),
    *([], {}, [[]], [None], {'x': {}}, [0] * 100, [3, 10**7, 10**7], {'type': 'os.system'}, [1.0, 1.0], ['x']),
)


@dataclass
class Case:
    """A folder with inputs, the arguments of a command on them, and the program that takes them."""

    folder: Path
    random: random.Random
    program: str = 'slimclr-hub'
    argv: list[str] = field(default_factory=list)


# Damage


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a value of JSON with each of its keys or indices."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in ((value, key), *places(inner))]


def damaged(value: Any, rng: random.Random, values: tuple[Any, ...] = VALUES) -> Any:
    """A value of JSON with one to three changes."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        found = places(value)
        if not found or rng.random() < 0.02:
            return copy.deepcopy(rng.choice(values))
        holder, key = rng.choice(found)
        change = rng.randrange(5)
        if change < 2:
            holder[key] = copy.deepcopy(rng.choice(values))  # or a change of it would change `values`
        elif change == 2:
            del holder[key]
        elif change == 3:
            other, name = rng.choice(found)
            holder[key] = json.loads(json.dumps(other.get(name) if isinstance(other, dict) else other[name]))
        elif isinstance(holder, dict):
            holder[str(rng.choice(values))[:6000]] = holder.pop(key)
        else:
            holder.insert(key, copy.deepcopy(rng.choice(values)))
    return value


def bitten(data: bytes, rng: random.Random) -> bytes:
    """Bytes of which some are changed, missing or there twice."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 20))):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(4):
            case 0:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del changed[at : at + rng.choice((1, 8, 1000))]
            case 2:
                changed[at:at] = changed[at : at + rng.choice((1, 8, 1000))]
            case 3:
                changed[at : at + 4] = rng.choice((b'\xff' * 4, b'\0' * 4, b'\x80', b'[' * 3000, b'\xc3\x28'))
    return bytes(changed)


def damage_text(path: Path, rng: random.Random, value: Any, write: Callable[[Any], str] = json.dumps) -> None:
    if rng.random() < 0.3:
        path.write_bytes(bitten(path.read_bytes(), rng))
    else:
        path.write_text(write(damaged(value, rng)))


def damage_safetensors(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], 'little')
    header, rest = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.3:
        start = bitten(data[: 8 + length], rng)
        path.write_bytes(start + rest)
        return
    shapes = tuple(sizes for sizes in ([], [0], [3], [16, 3, 3, 3], [10**9, 10**9], [2**40] * 4, [1] * 1000))
    kinds = ('F64', 'BF16', 'I8', 'BOOL', 'F8_E4M3', 'C64', 'U64')
    names = ('fc.weight', 'fc.w100.weight', 'conv1.weight', 'layer1.999.conv1.weight', 'layer9.0.bn1.w001.weight')
    header = json.dumps(damaged(json.loads(header), rng, (*VALUES, *shapes, *kinds, *names))).encode()
    path.write_bytes(len(header).to_bytes(8, 'little') + header + rest[: len(rest) - rng.choice((0, 0, 0, 1, 5000))])


def hostile_tensors(like: torch.Tensor) -> list[Callable[[], Any]]:
    return [
        lambda: like.to(torch.int32),
        lambda: like.to(torch.complex64),
        lambda: like.to(torch.float8_e4m3fn),
        lambda: like.double(),
        lambda: like.to('meta'),
        lambda: like.to_sparse(),
        lambda: torch.zeros(1).expand(2**20, 2**12, 3, 3),
        lambda: torch.zeros(1).expand(10**9, 64, 3, 3),
        lambda: torch.zeros(0, *like.shape),
        lambda: torch.full_like(like, float('nan')) if like.is_floating_point() else like,
        lambda: torch.tensor(1.0),
        lambda: like.flatten(),
        lambda: torch.nn.Parameter(like.float()),
        lambda: 'text',
    ]


def damage_checkpoint(path: Path, rng: random.Random) -> None:
    tensors: dict[Any, Any] = dict(torch.load(path, weights_only=True)['state_dict'])
    if rng.random() < 0.2:
        tensors = {rng.choice(('module.', 'encoder_q.', 'backbone.', 'x.y.')) + name: t for name, t in tensors.items()}
    for _ in range(rng.choice((0, 1, 1, 2, 30))):
        name = rng.choice([*tensors])
        match rng.randrange(4):
            case 0:
                del tensors[name]
            case 1:
                kept = tensors[name]  # one that is expanded to terabytes stays as it is
                whole = torch.is_tensor(kept) and kept.layout == torch.strided and kept.numel() < 2**30
                tensors[name] = rng.choice(hostile_tensors(kept))() if whole else kept
            case 2:
                wrong = ('', 'x', 3, None, True, 'layer1.999999999.conv1.weight', f'layer1.{"9" * 5000}.conv1.weight')
                more = ('\x1b[2J', 'bn1.bn.9999.weight', 'features.9.bn1.bn.0.weight', 'fc.weight', 'fc.linears.7.bias')
                tensors[rng.choice((*wrong, *more))] = tensors.pop(name)
            case 3:
                tensors[f'{name}.{rng.choice(("x", "w050", "0"))}'] = tensors[name]
    held: Any = rng.choice(({'state_dict': tensors}, {'model': tensors}, tensors, {'state_dict': tensors, 'args': [1]}))
    if rng.random() < 0.1:
        held = rng.choice((tensors, [tensors], {'state_dict': 3}, {}, None, {'state_dict': {'model': tensors}}))
    zipped = rng.random() < 0.8
    torch.save(held, path, _use_new_zipfile_serialization=zipped)
    if rng.random() < 0.5:
        return
    if not zipped or rng.random() < 0.2:
        path.write_bytes(bitten(path.read_bytes(), rng))
        return
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    victim = rng.choice([name for name in entries if name.endswith('.pkl')] * 9 + [*entries])
    entries[victim] = bitten(entries[victim], rng)
    with zipfile.ZipFile(path, 'w') as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


ALIASES = 'a: &a [x, x, x, x, x, x, x, x, x]\n' + ''.join(
    f'{new}: &{new} [{", ".join([f"*{old}"] * 9)}]\n' for old, new in zip('abcdefgh', 'bcdefghi', strict=True)
)
TEXTS = (
    ALIASES.encode(),
    'run: {name: modèle}'.encode('latin-1'),
    b'!!python/object/apply:os.system ["touch was_run"]',
    b'\x00\x01\x02',
    b'- a\n- b\n',
    b'&a [*a]',
    b'model: &m {name: x, widths: *m}',
    b'{' * 5000,
    b'model: {name: 2001-01-01, widths: 0x10}',
    b'base: ../../../../etc/passwd',
    b'run: {name: "\\u001b[2J"}',
)


def damage_recipe(path: Path, rng: random.Random) -> None:
    if rng.random() < 0.25:
        path.write_bytes(rng.choice(TEXTS))
    else:
        damage_text(path, rng, yaml.safe_load(path.read_text()), yaml.safe_dump)


# Commands


def of_network(case: Case, name: str) -> None:
    """A command that opens the network `name` of a case."""
    images = str(case.folder / 'images')
    case.argv = case.random.choice(
        [
            ['info', name],
            ['embed', name, images, '-o', 'out.npy', '--workers', '0'],
            ['embed', name, images, '-o', 'out.safetensors', '--workers', '0', '--width', '0.5'],
            ['predict', name, images, '--workers', '0'],
            ['compare', name, '--no-speed'],
            ['extract', name, 'out', '--width', '0.5'],
            ['extract', name, 'out.pth', '--width', '0.5', '--format', 'mmdet'],
            ['convert', name, 'out'] if name.endswith('.safetensors') else ['push', name, 'me/net', '--dry-run'],
        ]
    )


def safetensors(case: Case) -> None:
    damage_safetensors(case.folder / 'net' / 'model.safetensors', case.random)
    of_network(case, str(case.folder / 'net' / case.random.choice(('', 'model.safetensors'))).rstrip('/'))


def config(case: Case) -> None:
    file = case.folder / 'net' / 'config.json'
    damage_text(file, case.random, json.loads(file.read_text()))
    of_network(case, str(case.folder / 'net'))


def checkpoint(case: Case) -> None:
    file = case.folder / 'plain.pth'
    damage_checkpoint(file, case.random)
    case.argv = case.random.choice(
        [
            ['convert', str(file), 'out'],
            ['convert', str(file), 'out.safetensors', '--width', '1', '--width', '0.5'],
            ['convert', str(file), 'out.pth'],
            ['convert', str(file), 'out', '--encoder', 'momentum'],
            ['extract', str(file), 'out.pth', '--width', '0.5', '--format', 'mmdet'],
        ]
    )


def of_run(case: Case) -> None:
    run = str(case.folder / 'run')
    case.argv = case.random.choice(
        [
            ['compare', run, '--no-speed'],
            ['compare', run, '--no-speed', '--csv', '-'],
            ['compare', run, str(case.folder / 'other'), '--no-speed', '--seeds', '--markdown', 'out.md'],
            ['push', run, 'me/net', '--dry-run'],
            ['analyze', 'gradients', run, '--output', 'out'],
            ['analyze', 'condition', run, '--output', 'out'],
        ]
    )


def metrics(case: Case) -> None:
    file = case.folder / 'run' / 'metrics.jsonl'
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    damage_text(
        file,
        case.random,
        lines,
        lambda values: '\n'.join(map(json.dumps, values if isinstance(values, list) else [values])),
    )
    of_run(case)


def result(case: Case) -> None:
    file = case.folder / 'run' / 'linear_eval' / 'result.json'
    damage_text(file, case.random, json.loads(file.read_text()))
    of_run(case)


def recipe(case: Case) -> None:
    damage_recipe(case.folder / 'run' / 'recipe.yaml', case.random)
    if case.random.random() < 0.3:
        (case.folder / 'run' / 'config.json').unlink()  # as of a run that has not ended
    of_run(case)


def thresholds(case: Case) -> None:
    file = case.folder / 'cascade.json'
    damage_text(file, case.random, json.loads(file.read_text()))
    case.argv = ['predict', str(case.folder / 'net'), str(case.folder / 'images'), '--workers', '0']
    case.argv += ['--cascade', str(file), *case.random.choice(([], ['--budget', '1e7']))]


def statistics(case: Case) -> None:
    file = case.folder / 'resolutions.safetensors'
    if case.random.random() < 0.5:
        damage_safetensors(file, case.random)
    else:
        with safe_open(file, 'pt') as whole:
            (key, text), *_ = whole.metadata().items()
        save_file(load_file(file), file, {key: json.dumps(damaged(json.loads(text), case.random))})
    net, given = str(case.folder / 'net'), ['--resolutions', str(file)]
    case.argv = case.random.choice(
        [
            ['predict', net, str(case.folder / 'images'), '--workers', '0', '--size', '20', *given],
            ['choose', net, '--max-macs', '1e7', *given],
        ]
    )


def pretrain(case: Case) -> None:
    """The configuration of a new run, and that of a resumed one; training itself would take longer."""
    case.program = 'pretrain.py'
    file = case.folder / 'run' / 'recipe.yaml'
    damage_recipe(file, case.random)
    if case.random.random() < 0.5:
        case.argv = ['--resume', str(file.parent)]
    else:
        case.argv = ['--config', str(shutil.move(file, case.folder / 'mine.yaml'))]


IMPORTED_BY_COMMANDS = (
    'slimclr_hub.analysis.condition',
    'slimclr_hub.analysis.gradients',
    'slimclr_hub.detection.extract',
    'slimclr_hub.evaluate.compare.compare',
    'slimclr_hub.hub.push',
    'slimclr_hub.inference.embed',
    'slimclr_hub.inference.predict',
    'mmengine.logging',
)
KINDS = (safetensors, config, checkpoint, metrics, result, recipe, thresholds, statistics, pretrain)
PROGRAMS: dict[str, Callable[[], None]] = {
    'slimclr-hub': cli.main,
    'pretrain.py': lambda: run_script(lambda: (parse_pretrain(RECIPE), None)[1]),
}


def make_inputs(folder: Path) -> None:
    """Write the whole files that cases damage."""
    save_small(folder / 'net', num_classes=3)
    torch.save({'state_dict': small_network().extract(1.0).state_dict()}, folder / 'plain.pth')
    cascades = (Cascade((0.25,), 0.0, 2e6, 0.8), Cascade((0.25, 1.0), 0.5, 9e6, 1.0))
    weights = state_hash(open_network(str(folder / 'net')))
    FittedCascades(weights, 32, 20, cascades).save(folder / 'cascade.json')
    own = statistics_of(open_network(str(folder / 'net')))
    pairs = tuple(Pair(width, size, 0.5) for width in (1.0, 0.25) for size in (32, 20))
    Resolutions(weights, 32, 20, 20, pairs).save({20: own}, folder / 'resolutions.safetensors')
    (folder / 'images').mkdir()
    for i in range(2):
        Image.new('RGB', (40, 32), (99 * i, 50, 0)).save(folder / 'images' / f'{i}.png')
    for name in 'run', 'other':
        shutil.copytree(folder / 'net', folder / name)
        content = yaml.safe_load(RECIPE.read_text())
        content.pop('base', None)
        content['run'] = {**content.get('run', {}), 'seed': len(name)}
        (folder / name / 'recipe.yaml').write_text(yaml.safe_dump(content))
        records = [{'kind': 'train', 'epoch': 1, 'step': 1, 'loss': 1.0, 'info_nce/1': 0.5}]
        records += [
            {'kind': 'eval', 'epoch': e, 'step': e, 'knn/1': 50.0 + e, 'knn/0.5': 40.0, 'rank/1': 5.0} for e in (0, 1)
        ]
        (folder / name / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, records)) + '\n')
        protocol = Protocol('linear', 'fashion-mnist', head='switchable', features='cached', epochs=1)
        save([Result(name, protocol, {1.0: 80.0, 0.5: 70.0}, images=100)], folder / name / 'linear_eval')


# Running


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_hash(path) for path in sorted(folder.rglob('*')) if path.is_file()}


def run_case(number: int, seed: str, inputs: Path) -> str | None:
    """Run a case; return a description of its fault, if there is one."""
    with tempfile.TemporaryDirectory(prefix='fuzz-') as name:
        place = Path(name)
        shutil.copytree(inputs, place / 'in')
        (place / 'work').mkdir()
        (place / 'tmp').mkdir()
        case = Case(place / 'in', random.Random(f'{seed}-{number}'))
        kind = KINDS[number % len(KINDS)]
        kind(case)
        before = contents(case.folder)
        status, words = run_forked(case, place)
        command = f'{kind.__name__}: {case.program} {" ".join(case.argv)}'
        faults = []
        wrong = 1 if case.program == 'slimclr-hub' and case.argv[0] != 'analyze' else 2
        if status not in (0, wrong):
            faults.append(f'it ended with {status}')
        if status == wrong and not 0 < len(words) <= 4000:
            faults.append(f'its error has {len(words)} characters')
        if found := re.search(r'Traceback|MemoryError|allocate|\x1b|\x07', words):
            faults.append(f'it printed {found[0]!r}')
        if contents(case.folder) != before:
            faults.append('it changed its inputs')
        left = [str(path.relative_to(place)) for path in sorted(place.rglob('*')) if path.parent != place]
        left = [path for path in left if not path.startswith('in')]
        if (status and left) or any('partial' in path or path.startswith('tmp') for path in left):
            faults.append(f'it left {left[:3]}')
        return f'{number}: {command}: {", ".join(faults)}\n{words[-3000:]}' if faults else None


def run_forked(case: Case, place: Path) -> tuple[int, str]:
    """Run a command in a forked process; return its exit status, negative for a signal, and its standard error."""
    child = os.fork()
    if not child:
        status = 70
        try:
            os.chdir(place / 'work')
            for descriptor, name in ((0, os.devnull), (1, os.devnull), (2, str(place / 'error'))):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), descriptor)
            sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, 'w'), 'utf-8') for number in (1, 2))
            tempfile.tempdir = os.environ['TMPDIR'] = str(place / 'tmp')
            pages = int(Path('/proc/self/statm').read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            sys.argv = [case.program, *case.argv]
            try:
                PROGRAMS[case.program]()
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
            with contextlib.suppress(Exception):
                sys.stderr.flush()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, (place / 'error').read_text(errors='replace')


def main() -> None:
    """Run cases and print faults; exit with status 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--cases', type=int, default=1000)
    parser.add_argument('--seed', default='0', help='another seed damages otherwise')
    parser.add_argument('--only', type=int, help='repeat the case of this number')
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    for module in IMPORTED_BY_COMMANDS:
        import_module(module)
    numbers = range(options.cases) if options.only is None else [options.only]
    with tempfile.TemporaryDirectory(prefix='fuzz-inputs-') as name:
        make_inputs(Path(name))
        failed = 0
        for number in numbers:
            if fault := run_case(number, options.seed, Path(name)):
                failed += 1
                print(fault, end='\n\n', flush=True)
    print(f'{failed} of {len(numbers)} cases failed, with --seed {options.seed}')
    sys.exit(failed > 0)


if __name__ == '__main__':
    main()
