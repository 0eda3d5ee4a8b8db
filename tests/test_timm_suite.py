"""timm's own tests/test_models.py, of the timm that is installed, on our networks."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

import pytest
import timm

REPOSITORY = Path(__file__).parents[1]
# Of each kind of block and stem, and of each narrower width, one; the others differ in numbers alone.
DENSE = 'slimclr_resnet18_050', 'slimclr_resnet20_075', 'slimclr_resnet50_025'
SLIMMABLE = 'slimclr_resnet18', 'slimclr_resnet20', 'slimclr_resnet50'

# Every test of timm's that goes over all models or all ResNets.
TESTS = {
    'test_model_forward',
    'test_model_backward',
    'test_model_default_cfgs',
    'test_model_forward_torchscript',
    'test_model_forward_features',
    'test_model_forward_intermediates_features',
    'test_model_forward_intermediates',
    'test_prune_intermediate_layers_contract',
    'test_model_forward_fx',
    'test_model_backward_fx',
    'test_model_forward_fx_torchscript',
}
# A pass at one width reaches the normalisations and the head of that width alone.
WANT_EVERY_GRADIENT = {'test_model_backward', 'test_model_backward_fx', 'test_prune_intermediate_layers_contract'}
WANT_TORCHSCRIPT = {'test_model_forward_torchscript'}


@pytest.fixture(scope='module')
def timm_source() -> Path:
    """timm's source distribution, from the package index the first time."""
    cache = REPOSITORY / '.cache'
    source = cache / f'timm-{timm.__version__}'
    if not (source / 'tests' / 'test_models.py').exists():
        cache.mkdir(exist_ok=True)
        download = Path(tempfile.mkdtemp(dir=cache))
        command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm']
        subprocess.run([*command, f'timm=={timm.__version__}', '--dest', str(download)], check=True)
        (archive,) = download.glob('timm-*.tar.gz')
        with tarfile.open(archive) as tar:
            tar.extractall(download, filter='data')
        # Nothing but the tests is kept: timm itself is to be the installed one.
        source.mkdir(exist_ok=True)
        (download / f'timm-{timm.__version__}' / 'tests').rename(source / 'tests')
        shutil.rmtree(download)
    return source


@pytest.fixture(scope='module')
def results(timm_source, tmp_path_factory) -> dict[str, dict[str, str | None]]:
    """Failure message, or None, of each test function and model."""
    report = tmp_path_factory.mktemp('suite') / 'report.xml'
    command = [sys.executable, '-m', 'pytest', 'tests/test_models.py', '-k', 'slimclr', '-q', '-p', 'timm_plugin']
    command += ['-p', 'no:cacheprovider', '-c', os.devnull, '--rootdir', str(timm_source), f'--junitxml={report}']
    command += ['-W', 'ignore']
    environment = {
        **os.environ,
        'TIMM_SUITE_MODELS': ','.join(DENSE + SLIMMABLE),
        'PYTHONPATH': str(Path(__file__).parent),
    }
    environment.pop('GITHUB_ACTIONS', None)  # it would switch some of the tests off
    finished = subprocess.run(command, cwd=timm_source, env=environment, capture_output=True, text=True)
    assert finished.returncode in (0, 1), finished.stdout[-4000:] + finished.stderr[-4000:]
    results: dict[str, dict[str, str | None]] = defaultdict(dict)
    for case in ElementTree.parse(report).iter('testcase'):
        match = re.fullmatch(r'(\w+)\[(?:.*-)?(slimclr_\w+)(?:-.*)?\]', case.attrib['name'])
        assert match, case.attrib['name']
        assert case.find('skipped') is None, f'{case.attrib["name"]} was skipped'
        failure = case.find('failure') if case.find('failure') is not None else case.find('error')
        results[match[1]][match[2]] = None if failure is None else failure.attrib['message'] + (failure.text or '')
    return results


def failures(results: dict[str, dict[str, str | None]], models: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Messages by test and model, of those of these models that failed."""
    failed = {
        test: {model: text for model in models if (text := by_model[model]) is not None}
        for test, by_model in results.items()
    }
    return {test: by_model for test, by_model in failed.items() if by_model}


def test_every_one_ran(results):
    assert {test: set(by_model) for test, by_model in results.items()} == {test: {*DENSE, *SLIMMABLE} for test in TESTS}


def test_dense(results):
    assert failures(results, DENSE) == {}


def test_slimmable(results):
    failed = failures(results, SLIMMABLE)
    exceptions = {test: set(SLIMMABLE) for test in WANT_EVERY_GRADIENT | WANT_TORCHSCRIPT}
    assert {test: set(by_model) for test, by_model in failed.items()} == exceptions, failed
    for test in WANT_EVERY_GRADIENT:
        for model, message in failed[test].items():
            assert re.search('No gradient for|missing gradients|unused params', message), f'{test}[{model}]: {message}'
