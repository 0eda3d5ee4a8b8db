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
DENSE = (
    *(f'slimclr_resnet{depth}_{width}' for depth, width in ((50, '075'), (50, '050'), (50, '025'))),
    *(f'slimclr_resnet{depth}_050' for depth in (18, 20, 34)),
)
SLIMMABLE = tuple(f'slimclr_resnet{name}' for name in ('18', '20', '20x4', '34', '50'))

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


def run_suite(source: Path, models: tuple[str, ...], report: Path) -> dict[str, dict[str, str | None]]:
    """Failure message, or None, of each test function and model."""
    command = [sys.executable, '-m', 'pytest', 'tests/test_models.py', '-k', 'slimclr', '-q', '-p', 'timm_plugin']
    command += ['-p', 'no:cacheprovider', '-c', os.devnull, '--rootdir', str(source), f'--junitxml={report}']
    command += ['-W', 'ignore']
    environment = {**os.environ, 'TIMM_SUITE_MODELS': ','.join(models), 'PYTHONPATH': str(Path(__file__).parent)}
    environment.pop('GITHUB_ACTIONS', None)  # it would switch some of the tests off
    finished = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert finished.returncode in (0, 1), finished.stdout[-4000:] + finished.stderr[-4000:]
    results: dict[str, dict[str, str | None]] = defaultdict(dict)
    for case in ElementTree.parse(report).iter('testcase'):
        match = re.fullmatch(r'(\w+)\[(?:.*-)?(slimclr_\w+)(?:-.*)?\]', case.attrib['name'])
        assert match, case.attrib['name']
        assert case.find('skipped') is None, f'{case.attrib["name"]} was skipped'
        failure = case.find('failure') if case.find('failure') is not None else case.find('error')
        results[match[1]][match[2]] = None if failure is None else failure.attrib['message'] + (failure.text or '')
    return results


def failures(results: dict[str, dict[str, str | None]]) -> dict[str, dict[str, str]]:
    """Messages by test and model, of those that failed."""
    failed = {
        test: {model: text for model, text in by_model.items() if text is not None}
        for test, by_model in results.items()
    }
    return {test: by_model for test, by_model in failed.items() if by_model}


@pytest.mark.timeout(900)
def test_dense(timm_source, tmp_path):
    results = run_suite(timm_source, DENSE, tmp_path / 'report.xml')
    assert {test: set(by_model) for test, by_model in results.items()} == {test: set(DENSE) for test in TESTS}
    assert failures(results) == {}


@pytest.mark.timeout(900)
def test_slimmable(timm_source, tmp_path):
    results = run_suite(timm_source, SLIMMABLE, tmp_path / 'report.xml')
    assert {test: set(by_model) for test, by_model in results.items()} == {test: set(SLIMMABLE) for test in TESTS}
    failed = failures(results)
    exceptions = {test: set(SLIMMABLE) for test in WANT_EVERY_GRADIENT | WANT_TORCHSCRIPT}
    assert {test: set(by_model) for test, by_model in failed.items()} == exceptions, failed
    for test in WANT_EVERY_GRADIENT:
        for model, message in failed[test].items():
            assert re.search('No gradient for|missing gradients|unused params', message), f'{test}[{model}]: {message}'
