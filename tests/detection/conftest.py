"""Install the operators that mmcv-lite lacks before any test imports MMDetection, and read its index once."""

from functools import cache

from mmengine.config import utils

import slimclr_hub.detection.mmdetection  # noqa: F401

# For each config MMEngine looks through a hundred YAML files of MMDetection, which takes a second.
utils._get_cfg_metainfo = cache(utils._get_cfg_metainfo)
