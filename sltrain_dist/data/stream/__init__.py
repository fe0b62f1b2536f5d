"""Virtual streams, which turn documents into rows of tokens."""
