"""Numerical pieces that several packages share."""
