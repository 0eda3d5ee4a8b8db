"""Evaluation of frozen networks: features, k-NN, linear probes, and comparison of results."""
