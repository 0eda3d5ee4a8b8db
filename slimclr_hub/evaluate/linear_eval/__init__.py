"""Linear evaluation of a frozen network (paper, section 4.1)."""
