"""Recipes of any content: read as values, or refused in one line, in little memory."""

import resource
import sys

import pytest

from slimclr_hub.errors import InputError
from slimclr_hub.files import file_hash
from slimclr_hub.runs.command_line import _imported, read_recipe, read_recipes
from slimclr_hub.train.command import load_recipe

ALIASES = 'a: &a [x, x, x, x, x, x, x, x, x]\n' + ''.join(
    f'{new}: &{new} [{", ".join([f"*{old}"] * 9)}]\n' for old, new in zip('abcdefgh', 'bcdefghi', strict=True)
)
MERGES = 'a: &a {x: 1}\n' + ''.join(
    f'{new}: &{new} {{<<: [{", ".join([f"*{old}"] * 9)}]}}\n' for old, new in zip('abcdefgh', 'bcdefghi', strict=True)
)
TEXTS = {
    'aliases': (ALIASES.encode(), 'too long'),
    'merges': (MERGES.encode(), 'name the other recipe as `base`'),
    'latin-1': ('run: {name: modèle}'.encode('latin-1'), 'utf-8'),
    'binary': (bytes(range(256)), 'cannot be read as a recipe'),
    'a call': (b'!!python/object/apply:os.system ["true"]', 'could not determine a constructor'),
    'a date': (b'run: {name: 2001-01-01}', 'date is not JSON serializable'),
    'itself': (b'&a [*a]', 'Circular reference'),
    'depth': (b'{' * 5000, 'cannot be read as a recipe'),
    'length': (b'a: ' + b'x' * 300_000, 'too long'),
}


@pytest.fixture(autouse=True)
def _nothing_imported(monkeypatch):
    for name in 'evil', 'link':
        monkeypatch.delitem(sys.modules, f'slimclr_imported_{name}', raising=False)
        _imported.pop(f'{name}.py', None)


@pytest.mark.parametrize('kind', TEXTS)
def test_no_recipe(tmp_path, kind):
    text, words = TEXTS[kind]
    (tmp_path / 'mine.yaml').write_bytes(text)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=f'^{tmp_path}/mine.yaml .*{words}'):
        read_recipe(tmp_path / 'mine.yaml')
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_a_long_key_is_shortened(tmp_path):
    (tmp_path / 'mine.yaml').write_text(f'{"x" * 9000}: 1\n')
    with pytest.raises(InputError) as refused:
        load_recipe(tmp_path / 'mine.yaml')
    assert f'{tmp_path}/mine.yaml' in str(refused.value)
    assert len(str(refused.value)) < 1500


@pytest.mark.parametrize('key', ['knn.every', 'data.size', 'data.mean', 'model.widths', 'data.name', 'run.compile'])
def test_a_value_that_was_forgotten(tmp_path, key):
    section, name = key.split('.')
    (tmp_path / 'mine.yaml').write_text(f'{section}:\n  {name}:\n')
    with pytest.raises(InputError, match=f'^{key}: null is no value; give one, or leave the key out$'):
        load_recipe(tmp_path / 'mine.yaml')


def test_null_where_it_is_a_value(tmp_path):
    (tmp_path / 'mine.yaml').write_text('knn: {k: null}\ndata: {val_split: null}\n')
    config = load_recipe(tmp_path / 'mine.yaml')
    assert (config.knn.k, config.data.val_split) == (None, None)


def test_anchors_are_values(tmp_path):
    (tmp_path / 'mine.yaml').write_text('views: &v {crop_min: 0.2}\nsecond_views: *v\n')
    assert read_recipe(tmp_path / 'mine.yaml') == {'views': {'crop_min': 0.2}, 'second_views': {'crop_min': 0.2}}


@pytest.mark.parametrize('imports', ['mine.py', '[1]', '7', '{1: a}'])
def test_imports_that_are_none(tmp_path, imports):
    (tmp_path / 'mine.yaml').write_text(f'imports: {imports}\n')
    with pytest.raises(InputError, match=r'mine\.yaml: imports is .*; give a list of Python files'):
        load_recipe(tmp_path / 'mine.yaml')


@pytest.mark.parametrize(
    'place', ['evil.py', '{tmp_path}/evil.py', '{tmp_path}/../{name}/evil.py', '{tmp_path}/link.py']
)
@pytest.mark.parametrize('form', ['[{file}]', '{{{file}: null}}', '{{{file}: {digest}}}'])
def test_code_that_came_with_a_run_is_not_run(tmp_path, place, form):
    """A folder from elsewhere gives its own file, with whatever hash."""
    evil = tmp_path / 'evil.py'
    evil.write_text(f'open({str(tmp_path / "ran")!r}, "w")')
    (tmp_path / 'link.py').symlink_to(evil)
    file = place.format(tmp_path=tmp_path, name=tmp_path.name)
    (tmp_path / 'recipe.yaml').write_text(f'imports: {form.format(file=file, digest=file_hash(evil))}\n')
    for read in lambda: read_recipes(['--network', str(tmp_path)]), lambda: load_recipe(tmp_path / 'recipe.yaml'):
        with pytest.raises(InputError, match=r'recipe\.yaml asks to run .*; give --import FILE if you trust it'):
            read()
    assert not (tmp_path / 'ran').exists()
    read_recipes(['--network', str(tmp_path), '--import', str(tmp_path / place.rpartition('/')[2])])
    assert (tmp_path / 'ran').exists()
