"""Looks for configurations that fit."""
