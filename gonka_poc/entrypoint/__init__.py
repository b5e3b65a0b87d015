"""Modules that other software starts by their name."""
