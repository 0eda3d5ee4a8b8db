"""Runs and networks side by side."""
