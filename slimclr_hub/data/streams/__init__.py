"""Sharded sources, divided exactly over processes and workers, and resumable at any step."""
