"""Slimmable self-supervised networks for timm. Importing this package registers them; it does nothing else."""

from slimclr_hub import models as models
from slimclr_hub.version import __version__ as __version__
