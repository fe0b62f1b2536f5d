"""Distributed engines behind one protocol."""
