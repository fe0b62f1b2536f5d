"""Optimizers of matrices, which follow orthogonalized momentum (`optim.factors`)."""
