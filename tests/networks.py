"""Networks as tests want them."""

from torch import nn


def randomise_batchnorm(model: nn.Module) -> None:
    """Give every batch normalisation values of its own, so that a mix-up of widths or layers shows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            assert module.num_batches_tracked is not None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            module.num_batches_tracked.fill_(9)
