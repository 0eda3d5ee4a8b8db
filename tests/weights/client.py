"""A process that loads weights as users do, told what to do from a test.

huggingface_hub reads where its Hub is when it is imported, and importing takes seconds: a process serves many tests.
"""

import dataclasses
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slimclr_hub.errors import InputError

ROOT = Path(__file__).parents[2]


@dataclass
class Answer:
    """Outcome of a call: a value or an error, and the log lines meanwhile as (logger, level, message)."""

    value: Any
    error: str | None
    message: str
    log: list[tuple[str, str, str]]

    def told(self, level: str) -> list[str]:
        """Messages that the package itself logged."""
        return [message for name, at, message in self.log if name.startswith('slimclr_hub.') and at == level]

    @property
    def sources(self) -> list[str]:
        return [message for message in self.told('INFO') if message.startswith('Weights from')]


class Client:
    """The process; it takes one call at a time."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'tests.weights.client'],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.receive()  # all is imported

    def send(self, action: str, *args: Any, env: dict[str, str] | None = None, **kwargs: Any) -> None:
        """Start a call of one of `ACTIONS`; paths go as strings, `env` is set for this call alone."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps([action, args, kwargs, env or {}], default=str) + '\n')
        self.process.stdin.flush()

    def receive(self) -> Answer:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, f'the process ended with {self.process.wait()}'
        return Answer(**json.loads(line))

    def __call__(self, action: str, *args: Any, env: dict[str, str] | None = None, **kwargs: Any) -> Answer:
        self.send(action, *args, env=env, **kwargs)
        return self.receive()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """A hash of names, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f'{name} {tensor.dtype} {list(tensor.shape)}'.encode())
        found.update(tensor.reshape(-1).numpy().tobytes())
    return found.hexdigest()


def from_hub(repo: str, cache_dir: str, **kwargs: Any) -> str:
    from slimclr_hub.weights import source

    return str(source.from_hub(repo, cache_dir=Path(cache_dir), **kwargs))


def published(tag: str, cache_dir: str) -> str:
    from slimclr_hub.models.convert import convert
    from slimclr_hub.weights import source

    return str(source.published(tag, convert, Path(cache_dir)))


def fetch(file: str, cache_dir: str) -> str:
    """A release's file of any name."""
    from slimclr_hub.models.convert import convert
    from slimclr_hub.weights import source
    from slimclr_hub.weights.published import PUBLISHED

    network = dataclasses.replace(PUBLISHED['mocov2_200e_in1k'], file=file)
    return str(source.from_release(network, convert, Path(cache_dir)))


def create(name: str, **kwargs: Any) -> str:
    """timm's network of pretrained weights, as their digest."""
    import timm

    import slimclr_hub  # noqa: F401

    return digest(timm.create_model(name, pretrained=True, **kwargs).state_dict())


ACTIONS: dict[str, Callable[..., str]] = {f.__name__: f for f in (from_hub, published, fetch, create)}


class Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.log.append((record.name, record.levelname, record.getMessage()))


def main() -> None:
    # What a library prints is not an answer.
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    recorder = Recorder()
    logging.basicConfig(level=logging.INFO, handlers=[recorder])
    print(json.dumps(dataclasses.asdict(Answer(None, None, '', []))), file=answers, flush=True)
    for line in sys.stdin:
        action, args, kwargs, env = json.loads(line)
        recorder.log = []
        answer = Answer(None, None, '', recorder.log)
        os.environ.update(env)
        try:
            answer.value = ACTIONS[action](*args, **kwargs)
        except Exception as error:
            kind = type(error)
            answer.error = 'InputError' if isinstance(error, InputError) else f'{kind.__module__}.{kind.__qualname__}'
            answer.message = str(error)
        for key in env:
            del os.environ[key]
        print(json.dumps(dataclasses.asdict(answer)), file=answers, flush=True)


if __name__ == '__main__':
    main()
