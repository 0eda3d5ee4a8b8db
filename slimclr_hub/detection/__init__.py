"""Slimmable networks in detection: MMDetection's parts in `mmdetection`, torchvision's in `torchvision_backbone`."""
