"""What is asked of the memory model: `sltrain plan`."""
