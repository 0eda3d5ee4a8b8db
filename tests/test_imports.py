"""What importing the package costs, and which of its rooms may look into which."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import slimclr_hub

PACKAGE = Path(slimclr_hub.__file__).parent
HEAVY = {'transformers', 'datasets', 'matplotlib', 'mmdet', 'accelerate', 'jsonargparse', 'rich'}

# design.md, "Rooms": the rooms that each may import from, itself aside. What stands at the top knows no room.
BELOW: dict[str, set[str]] = {'text': set(), 'errors': {'text'}, 'version': set()}
GROUND = {'errors', 'text', 'version', 'files', 'distributed', 'settings', 'images', 'machine'}
BELOW |= {'files': {'errors'}, 'distributed': {'errors'}, 'settings': {'errors'}, 'images': set(), 'machine': set()}
BELOW |= {'weights': GROUND, 'data': GROUND, 'runs': GROUND | {'weights'}}
BELOW['models'] = GROUND | {'weights'}
BELOW['methods'] = BELOW['models'] | {'models'}
BELOW['hub'] = BELOW['methods'] | {'runs'}
BELOW['inference'] = BELOW['hub'] | {'hub'}
BELOW['evaluate'] = BELOW['models'] | {'models', 'hub', 'inference', 'methods', 'data', 'runs'}
BELOW['train'] = BELOW['evaluate'] | {'evaluate'}
BELOW['analysis'] = BELOW['train'] | {'train'}
BELOW['finetune'] = BELOW['train'] | {'train'}
BELOW['detection'] = GROUND | {'weights', 'models', 'hub'}
BELOW['__init__'] = {'version', 'models'}
BELOW['cli'] = set(BELOW) - {'__init__'}  # the command starts anything
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob('*.py'))


def rooms_imported(path: Path) -> set[str]:
    """Rooms of the package that a module imports from, inside functions and type checks too."""
    rooms = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}:{node.lineno}: a relative import'
            names = [f'{node.module}.{alias.name}' for alias in node.names]
        else:
            continue
        rooms |= {name.split('.')[1] for name in names if name.startswith('slimclr_hub.')}
    return rooms


@pytest.mark.parametrize('path', MODULES, ids=str)
def test_rooms_import_only_those_below(path):
    room = path.parts[0].removesuffix('.py')
    assert rooms_imported(path) - {room} <= BELOW[room]


def test_the_rooms_are_seen():
    """Were the parsing blind, the test above would pass on everything."""
    assert rooms_imported(Path('methods/mocov2.py')) == {'distributed', 'errors', 'methods', 'models', 'settings'}
    assert rooms_imported(Path('__init__.py')) == {'models', 'version'}
    assert {'weights', 'models', 'hub', 'methods', 'data', 'train', 'evaluate'} <= {path.parts[0] for path in MODULES}


MEASURE = """
import json, sys, time
import timm
before = set(sys.modules)
start = time.process_time()
import slimclr_hub
seconds = time.process_time() - start
assert timm.is_model('slimclr_resnet50')
print(json.dumps([seconds, sorted({name.split('.')[0] for name in set(sys.modules) - before}), sorted(sys.modules)]))
"""


def measure():
    """Seconds that the import adds to `import timm`, top-level modules that it adds, and all modules there are then."""
    finished = subprocess.run([sys.executable, '-c', MEASURE], capture_output=True, text=True, check=True)
    return json.loads(finished.stdout)


@pytest.fixture(scope='module')
def measured():
    return measure()


def test_import_is_light(measured):
    _, added, loaded = measured
    assert HEAVY.isdisjoint(loaded)
    assert 'slimclr_hub' in added
    assert 'slimclr_hub.models.registry' in loaded
    assert not any(name.startswith(('slimclr_hub.train', 'slimclr_hub.data')) for name in loaded)


def test_import_registers_before_that_of_timm():
    script = "import slimclr_hub; import timm; assert timm.is_model('slimclr_resnet50'); slimclr_hub.models"
    subprocess.run([sys.executable, '-c', script], check=True)


def test_import_is_quick(measured):
    """In one of three processes: other work on the machine makes the others slow."""
    assert measured[0] < 0.3 or any(measure()[0] < 0.3 for _ in range(2))
