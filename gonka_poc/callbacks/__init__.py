"""Callbacks: from a computed batch to the receiver that has taken it."""
