"""Hugging Face: models and tokenizers in the formats that its libraries load."""
