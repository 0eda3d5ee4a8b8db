"""Slimmable layers and networks, and their place in timm's registry."""

from slimclr_hub.models import registry as registry
from slimclr_hub.models.calibrate import calibrate_width as calibrate_width
from slimclr_hub.models.dense import DenseResNet as DenseResNet
from slimclr_hub.models.slimmable_resnet import SlimmableResNet as SlimmableResNet
from slimclr_hub.models.widths import DEFAULT_WIDTHS as DEFAULT_WIDTHS
