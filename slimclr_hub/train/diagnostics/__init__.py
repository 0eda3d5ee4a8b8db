"""Records of gradients and weights while a run trains (paper, section 3.2)."""
