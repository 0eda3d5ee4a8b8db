"""Slimmable detectors: MMDetection's in `mmdetection`, torchvision's in `torchvision_backbone`."""
