"""Which engine holds, gathers and sends what, and when."""
