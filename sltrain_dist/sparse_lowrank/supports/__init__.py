"""The supports: three ways to choose the fixed positions of the sparse part."""
