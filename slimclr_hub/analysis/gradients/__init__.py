"""Gradient imbalance and gradient direction divergence (paper, section 3.2)."""
