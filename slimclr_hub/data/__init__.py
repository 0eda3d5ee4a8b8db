"""Data sources, augmented views, and the batches of training."""

from slimclr_hub.data.config import DataConfig as DataConfig
from slimclr_hub.data.views import ViewConfig as ViewConfig
