"""Fine-tuning of a network on images with classes, at all of its widths at once."""
