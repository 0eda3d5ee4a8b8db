"""The authors' kinds of checkpoint, small networks as folders, and a process that stays a client of the Hub."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch

from slimclr_hub.hub.card import training_card
from slimclr_hub.hub.folder import save_folder
from slimclr_hub.models.cost import width_facts
from tests.formula import tensor
from tests.networks import randomise_batchnorm
from tests.reference import DATA

ROOT = Path(__file__).parents[2]
LAYOUTS = {
    'mocov2': 'slimclr-mocov2 pre-training',
    'mocov3': 'slimclr-mocov3 pre-training',
    'probe': 'linear probe (switchable)',
}
"""Kind of checkpoint -> its name in `checkpoint_layouts.json`."""
_MOMENTUM = ('encoder_k', 'momentum_encoder')
_ENCODERS = (*_MOMENTUM, 'encoder_q', 'base_encoder')


def checkpoint(kind: str) -> dict[str, Any]:
    """Make a checkpoint as the authors' code saves it, with tensors by the formula, under the names without prefix.

    The momentum encoder has other values, and has seen no batch at the widths below 1.0.
    """
    layout = json.loads((DATA / 'checkpoint_layouts.json').read_text())[LAYOUTS[kind]]
    tensors = {name: _tensor(name.removeprefix('module.'), *about) for name, about in layout.items()}
    return {'epoch': 200, 'global_step': 1000, 'arch': 'resnet50', 'state_dict': tensors, 'best_acc1': 0.0}


def _tensor(name: str, shape: list[int], dtype: str) -> torch.Tensor:
    network, _, inner = name.partition('.')
    momentum = network in _MOMENTUM
    if momentum and name.endswith('num_batches_tracked') and '.bn.0.' not in name:
        return torch.tensor(0)
    values = tensor(inner if network in _ENCODERS else name, shape, salt=int(momentum))
    return torch.from_numpy(values).to(getattr(torch, dtype))


def small_network(name: str = 'slimclr_resnet20', **kwargs: Any) -> Any:
    """A network as after training: its normalisations have statistics of their own at every width."""
    torch.manual_seed(0)
    model = timm.create_model(name, zero_init_last=False, **kwargs)
    randomise_batchnorm(model)
    return model.eval()


def save_small(folder: Path, **kwargs: Any) -> Any:
    """Write a small network as training would, card included; returns it."""
    model = small_network(**kwargs)
    about = {
        'name': folder.name,
        'folder': str(folder),
        'architecture': 'slimclr_resnet20',
        'method': 'MoCo v2',
        'data': 'fashion-mnist-6k',
        'epochs': '12',
        'size': '32',
    }
    card = training_card(width_facts(model, 32), about)
    mean, std = (0.1, 0.2, 0.3)[: model.in_chans], (0.4, 0.5, 0.6)[: model.in_chans]
    save_folder(model, folder, size=32, mean=mean, std=std, crop_pct=1.0, card=card)
    return model


class Ended(NamedTuple):
    """A command that has ended: its exit status and what it printed."""

    status: int
    out: str
    err: str


_LOOP = """
import contextlib, io, json, logging, os, sys, traceback

answers, sys.stdout = sys.stdout, sys.stderr
from slimclr_hub import cli

def run(argv):
    sys.argv = ['slimclr-hub', *argv]
    logging.root.handlers.clear()  # they hold the standard error of the step before
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0

names = {}
for line in sys.stdin:
    step, out, err = json.loads(line), io.StringIO(), io.StringIO()
    names.pop('result', None)
    os.environ.update(step['environment'])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            result = run(step['argv']) if 'argv' in step else exec(step['code'], names) or names.get('result')
            failure = None
        except BaseException:
            result, failure = None, traceback.format_exc()
    for name in step['environment']:
        del os.environ[name]
    print(json.dumps([result, out.getvalue(), err.getvalue(), failure]), file=answers, flush=True)
os._exit(0)  # taking everything apart takes seconds
"""


class Client:
    """A process that runs commands and code one after the other, as importing all that they need takes long.

    huggingface_hub reads its environment when it is imported, so nothing of it can be set in the process of the tests.
    """

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, '-c', _LOOP], env=environment, cwd=folder, stdin=-1, stdout=-1, text=True
        )

    def __enter__(self) -> 'Client':
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()

    def command(self, *argv: object, **environment: str) -> Ended:
        """Run `slimclr-hub` with these arguments; an exception that it lets through fails the test."""
        return Ended(*self._ask({'argv': [*map(str, argv)], 'environment': environment}))

    def run(self, code: str, **environment: str) -> Any:
        """Run code, which may leave something of JSON as `result`; names stay for the next."""
        return self._ask({'code': code, 'environment': environment})[0]

    def _ask(self, step: dict[str, Any]) -> tuple[Any, str, str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(step), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, 'the client has ended'
        result, out, err, failure = json.loads(answer)
        assert failure is None, f'{failure}\n{err}'
        return result, out, err
