"""Checkpoints: atomic, hashed, and independent of the engine and the number of ranks."""
