"""Error surface and optimisation trajectory (paper, figure 5)."""
