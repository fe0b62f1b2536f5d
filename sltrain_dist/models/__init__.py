"""The LLaMA decoder, its loss, and its parameter and FLOP counts."""
