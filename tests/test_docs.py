"""README and the manual: files, options, keys and names that they mention exist."""

import ast
import importlib
import io
import re
import runpy
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest
import typer

from slimclr_hub.cli import app

ROOT = Path(__file__).parents[1]
README = ROOT / 'README.md'
PAGES = [README, ROOT / 'transfer' / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
LINKING = [*PAGES, ROOT / 'RESULTS.md', ROOT / 'CONTRIBUTING.md', ROOT / 'CHANGELOG.md']
RECIPES = 'pretrain', 'linear_eval', 'knn_eval', 'finetune', 'robustness'
SECTIONS = 'method|teacher|data|views|augment|optim|knn|probe|diagnostics|run|features'
EACH_PAGE = pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page, language):
    return re.findall(rf'^```{language}.*?\n(.*?)^```$', page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page, start):
    """Commands that begin with `start`, of blocks and within text, each in one line and without comments."""
    lines = '\n'.join(blocks(page, 'bash')).replace('\\\n', ' ').splitlines()
    lines += re.findall(r'`([^`\n]+)`', page.read_text())
    return [re.sub(r'\s# .*', '', line) for line in lines if line.startswith(start)]


@cache
def help_of(recipe):
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(sys, 'argv', [f'{recipe}.py', '--help'])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / 'recipes' / f'{recipe}.py'), run_name='__main__')
    assert not ended.value.code
    return said.getvalue()


@cache
def options():
    """Command of `slimclr-hub` -> its options."""
    group = typer.main.get_command(app)
    return {name: {opt for p in command.params for opt in p.opts} for name, command in group.commands.items()}


def test_readme_is_a_short_way_in():
    text = README.read_text()
    assert len(text.splitlines()) <= 200
    for page in (ROOT / 'docs').glob('*.md'):
        if page.stem != 'index':
            assert f'docs/{page.name}' in text, f'README does not lead to {page.name}'


@pytest.mark.parametrize('page', LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r'\]\((?!https?:|#)([^)#\s]+)', page.read_text()):
        # Pages of the manual see the repository's own as if these lay beside them (docs/hooks.py).
        assert (page.parent / target).exists() or (page.parent.name == 'docs' and (ROOT / target).exists()), target


@EACH_PAGE
def test_commands_have_these_options(page):
    for line in commands(page, 'slimclr-hub '):
        _, name, *rest = line.split()
        if name != 'COMMAND':
            given = {word.partition('=')[0] for word in rest if re.match(r'-\w|--\w', word)}
            assert name in options(), line
            assert name == 'analyze' or given <= options()[name], line


@EACH_PAGE
def test_recipes_have_these_options(page):
    for line in commands(page, ('accelerate launch', 'python recipes/')):
        script = re.search(r'recipes/(\w+)\.py(.*)', line)
        if script is None or script[1] not in RECIPES:  # `accelerate launch` itself; analyses have parsers of their own
            continue
        for option in re.findall(r'--([\w.]+)', script[2]):
            assert f'--{option} ' in help_of(script[1]) + '--help ', line
        for config in re.findall(r'--config (\S+\.yaml)', script[2]):
            assert (ROOT / config).exists() or 'my_recipe' in config, config


@EACH_PAGE
def test_keys_exist(page):
    known = ''.join(map(help_of, RECIPES))
    for key in re.findall(rf'[`-]((?:{SECTIONS})\.[a-z_]+)\b(?![./(])', page.read_text()):
        assert f'--{key} ' in known, key


@EACH_PAGE
def test_python_imports_what_exists(page):
    for block in blocks(page, 'python'):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'slimclr_hub':
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f'{node.module}.{alias.name}'
