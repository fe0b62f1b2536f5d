"""What a run takes: predicted, replayed, searched."""
