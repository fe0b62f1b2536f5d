"""The two ways to apply a layer."""
