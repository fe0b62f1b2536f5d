"""The fixed positions of the sparse part: three ways to draw them."""
