"""Install the operators that mmcv-lite lacks before any test imports MMDetection."""

import slimclr_hub.detection.mmdetection  # noqa: F401
