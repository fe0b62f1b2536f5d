"""The LLaMA decoder, its loss, and its counts."""
