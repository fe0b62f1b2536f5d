"""Progress, metrics and experiment tracking."""
