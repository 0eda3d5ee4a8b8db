"""Embeddings and predictions: images in, numbers out. Trains nothing."""
