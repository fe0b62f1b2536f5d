"""The memory of the paper: its accounting, and an emulation of its published code."""
