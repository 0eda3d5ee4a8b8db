"""Files of tensors: names, slices, layouts. Knows tensors, no models."""
