"""Analyses of runs: gradients, trajectory, error surface and linear-probe condition, with their figures."""
