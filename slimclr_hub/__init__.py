"""Slimmable self-supervised networks for timm. Importing this package registers them; it does nothing else."""

import os
import sys

from slimclr_hub.version import __version__ as __version__

# The command imports PyTorch, which takes seconds, only where it opens a network.
if os.path.splitext(os.path.basename(*sys.argv[:1] or ['']))[0] != 'slimclr-hub':
    from slimclr_hub import models as models
