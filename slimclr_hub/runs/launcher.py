"""The processes, devices and precision that a job was launched with.

Accelerate takes settings from its launcher and from the environment, too. Those that would change the numbers of a job,
or that it cannot train with, are refused before any work.
"""

import os
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DynamoBackend
from accelerate.utils.environment import get_int_from_env

from slimclr_hub.errors import InputError
from slimclr_hub.settings import PRECISIONS, check_all
from slimclr_hub.text import first_line

_SIZES = ('WORLD_SIZE', 'PMI_SIZE', 'OMPI_COMM_WORLD_SIZE', 'MV2_COMM_WORLD_SIZE')
_SHARDING = ('DEEPSPEED', 'FSDP', 'MEGATRON_LM', 'PARALLELISM_CONFIG')


def launched(precision: str | None, key: str = 'run.precision', *, trains: bool = True, **options: Any) -> Accelerator:
    """The accelerator of a job, which divides the batches of its loaders among the processes.

    Args:
        precision: As of accelerate; what the launcher says where None.
        key: Name of the setting `precision`, for messages.
        trains: False for a job without gradients, to which settings of training are all the same.
        options: Further arguments of accelerate's.

    Raises:
        InputError: The device does not have the precision; processes were started that would not work together; or the
            launcher asks for accumulation, compilation or sharding of its own.
    """
    for name in _SHARDING:
        if os.environ.get(f'ACCELERATE_USE_{name}', '').lower() in ('1', 'true'):
            raise InputError(
                f'the launcher asks for {name} (ACCELERATE_USE_{name}), and networks train whole on each device; '
                'launch without it'
            )
    try:
        loading = DataLoaderConfiguration(split_batches=True, non_blocking=True)
        accelerator = Accelerator(mixed_precision=precision, dataloader_config=loading, **options)
    except (ValueError, ImportError) as error:
        raise InputError(f'{key} {precision}: {first_line(error)}') from error
    check_all(_problems(accelerator, key, trains))
    return accelerator


def _problems(accelerator: Accelerator, key: str, trains: bool) -> Iterator[str]:
    started = get_int_from_env(_SIZES, 1)
    if started != accelerator.num_processes:
        yield (
            f'{started} processes were started, and each would work alone, as there are no GPUs for them; '
            'ACCELERATE_USE_CPU=true lets them share the work on CPUs'
        )
    told = accelerator.mixed_precision
    if told not in PRECISIONS:
        yield f'precision {told} of the launcher is not one of {", ".join(PRECISIONS)}; give --{key} bf16'
    if told == 'fp16' and accelerator.device.type == 'cpu':
        yield f'{key} fp16 needs a GPU, and would be float32 on a CPU; give --{key} no, or bf16'
    if not trains:
        return
    if (steps := accelerator.gradient_accumulation_steps) != 1:
        yield (
            f'the launcher asks for gradient accumulation over {steps} steps '
            f'(ACCELERATE_GRADIENT_ACCUMULATION_STEPS), which would only divide gradients by {steps}; launch without '
            f'it, and for pre-training give --optim.accumulation_steps {steps}'
        )
    if (backend := accelerator.state.dynamo_plugin.backend) is not DynamoBackend.NO:
        yield (
            f'the launcher asks for the dynamo backend {backend.value.lower()} (ACCELERATE_DYNAMO_BACKEND), which '
            'cannot train several widths; launch without it, and for pre-training give --run.compile true'
        )
