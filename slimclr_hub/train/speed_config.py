"""What makes training fast, where it can be switched off."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SpeedConfig:
    """Fast paths; each gives what the plain one gives but for rounding.

    Further ones are run.channels_last, run.precision and views.backend.

    Args:
        shared: Make the slices of weights once a step instead of in every layer's forward and backward, add up the
            gradients of all widths in one place, and let one first convolution serve all widths.
        lerp: Move the momentum encoder in one pass over memory.
        fused: Step PyTorch's optimizers by one kernel, where they have one; not with run.precision fp16, whose scaler
            looks at every step.
        compile: Compile each width, and the momentum encoder, by torch.compile: minutes at the start, and worth it on
            GPUs; CPUs gain nothing.
        keep_memory: On the CPU, with glibc, keep memory that a step has freed for the next one, instead of giving it
            back to the system and getting it again page by page, filled with zeros.
    """

    shared: bool = True
    lerp: bool = True
    fused: bool = True
    compile: bool = False
    keep_memory: bool = True
