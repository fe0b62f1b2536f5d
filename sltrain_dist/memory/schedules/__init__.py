"""Timelines of an update: what each engine stores, gathers and sends, and when."""
