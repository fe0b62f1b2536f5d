"""From documents to rows of tokens, in an order that does not depend on ranks."""
