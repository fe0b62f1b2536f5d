"""The paper's accounting of memory, and an emulation of its published code."""
