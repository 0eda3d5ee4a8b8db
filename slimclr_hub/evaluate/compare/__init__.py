"""Comparison of runs and networks: cost, speed and accuracy."""
