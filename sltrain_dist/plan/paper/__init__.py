"""The paper: its accounting, and its published code."""
