"""This process among others: its rank, its device, its launcher, and what ends it when it hangs."""
