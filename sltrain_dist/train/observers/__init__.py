"""Observers, which measure and check a run without being part of the training."""
