"""The two paths: ways to apply a layer."""
