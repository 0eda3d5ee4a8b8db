"""Before any test imports parts of MMDetection: the operators that mmcv-lite has not."""

import slimclr_hub.detection.mmdetection  # noqa: F401
