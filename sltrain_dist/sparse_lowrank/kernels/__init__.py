"""Kernels for the products of the sparse part."""
