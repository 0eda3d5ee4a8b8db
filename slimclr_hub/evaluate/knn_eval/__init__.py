"""Weighted k-NN accuracy of a network, on one process or several."""
