"""Data pipeline from documents to rows of tokens, in an order that does not depend on the number of ranks."""
