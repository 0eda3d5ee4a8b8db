"""Data sources, two-view transforms and loaders."""

from slimclr_hub.data.sources import DataConfig as DataConfig
from slimclr_hub.data.views import ViewConfig as ViewConfig
