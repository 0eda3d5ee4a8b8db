"""Pre-training methods: `forward(views, widths, momentum, labels) -> {'loss', ...}`."""

from slimclr_hub.methods.bingo import BINGO as BINGO
from slimclr_hub.methods.compress import CompRess as CompRess
from slimclr_hub.methods.disco import DisCo as DisCo
from slimclr_hub.methods.losses import register_distillation as register_distillation
from slimclr_hub.methods.mocov2 import MoCoV2 as MoCoV2
from slimclr_hub.methods.mocov3 import MoCoV3 as MoCoV3
from slimclr_hub.methods.registry import METHODS as METHODS
from slimclr_hub.methods.registry import register_method as register_method
from slimclr_hub.methods.seed import SEED as SEED
from slimclr_hub.methods.simclr import SimCLR as SimCLR
from slimclr_hub.methods.supervised import Supervised as Supervised
from slimclr_hub.methods.teacher import Teacher as Teacher
