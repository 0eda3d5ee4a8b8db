"""What the launcher and the environment ask for: refused in one line where it would change the numbers of a job."""

import multiprocessing
import os
import socket
import threading
from typing import Any

import pytest
from accelerate import PartialState
from accelerate.state import AcceleratorState

from slimclr_hub.errors import InputError
from slimclr_hub.runs.job import StopSignals
from slimclr_hub.runs.launcher import launched

ON_CPUS = {'ACCELERATE_USE_CPU': 'false', 'CUDA_VISIBLE_DEVICES': ''}
REFUSED = {
    'accumulation': (
        {'ACCELERATE_GRADIENT_ACCUMULATION_STEPS': '4'},
        'gradient accumulation over 4 steps .* give --optim.accumulation_steps 4',
    ),
    'no number': ({'ACCELERATE_GRADIENT_ACCUMULATION_STEPS': 'four'}, "'four'"),
    'a compiler': (
        {'ACCELERATE_DYNAMO_BACKEND': 'INDUCTOR'},
        'the dynamo backend inductor .* give --run.compile true',
    ),
    'fp16 on a CPU': ({'ACCELERATE_MIXED_PRECISION': 'fp16'}, 'run.precision fp16 needs a GPU, .* bf16'),
    'mpirun on CPUs': (
        {'OMPI_COMM_WORLD_SIZE': '3', **ON_CPUS},
        '3 processes were started, and each would work alone, .* ACCELERATE_USE_CPU=true',
    ),
    'sharding': ({'ACCELERATE_USE_FSDP': 'true'}, 'the launcher asks for FSDP'),
    'DeepSpeed': ({'ACCELERATE_USE_DEEPSPEED': 'true'}, 'the launcher asks for DEEPSPEED'),
    'a precision that nobody knows': ({'ACCELERATE_MIXED_PRECISION': 'fp7'}, 'fp7'),
}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize('case', REFUSED)
def test_refused_in_one_line(monkeypatch, case):
    environment, named = REFUSED[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=named) as refused:
        launched(None)
    assert '\n' not in str(refused.value)


def launch_as_torchrun_does(rank: int, port: int, answers: Any) -> None:
    own = {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': '2'}
    os.environ.update({**ON_CPUS, **own, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)})
    try:
        answers.put(f'launched {launched(None).num_processes}')
    except InputError as error:
        answers.put(str(error))
    PartialState().destroy_process_group()


def test_torchrun_on_cpus():
    """Accelerate takes each process for the only one."""
    context = multiprocessing.get_context('fork')
    answers = context.SimpleQueue()
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    several = [context.Process(target=launch_as_torchrun_does, args=(rank, port, answers)) for rank in range(2)]
    for process in several:
        process.start()
    for process in several:
        process.join()
        assert '2 processes were started, and each would work alone' in answers.get()


def test_settings_of_training_do_not_stop_a_measurement(monkeypatch):
    monkeypatch.setenv('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', '4')
    monkeypatch.setenv('ACCELERATE_DYNAMO_BACKEND', 'INDUCTOR')
    assert launched('bf16', trains=False).mixed_precision == 'bf16'


def test_thread_gets_no_signals():
    noted = []

    def work() -> None:
        with StopSignals() as signals:
            noted.append(signals.wait(lambda: 'done', 1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert noted == ['done']
