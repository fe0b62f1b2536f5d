"""Saving and resuming: atomic, hashed, engine-neutral."""
