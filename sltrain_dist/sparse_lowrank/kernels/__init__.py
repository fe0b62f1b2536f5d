"""The products of the sparse part as kernels."""
