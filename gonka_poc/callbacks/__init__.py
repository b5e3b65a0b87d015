"""Callbacks: from a computed batch to the receiver that has accepted it."""
