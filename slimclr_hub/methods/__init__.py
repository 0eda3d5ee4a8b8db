"""Pre-training methods: `forward(views, widths, momentum) -> {'loss', ...}`."""

from slimclr_hub.methods.mocov2 import MoCoV2 as MoCoV2
from slimclr_hub.methods.mocov3 import MoCoV3 as MoCoV3
