"""How a single file of documents is recognised, decompressed and decoded."""
