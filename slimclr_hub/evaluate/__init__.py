"""k-NN accuracy and the reports of a run."""
