"""A trained model at work: loading it for inference, and continuing prompts."""
