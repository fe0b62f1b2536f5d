"""Preparation of C4-format shards from raw text."""
