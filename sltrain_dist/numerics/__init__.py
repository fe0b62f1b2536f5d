"""Numerical routines that several packages share."""
