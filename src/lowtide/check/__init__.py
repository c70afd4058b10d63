"""Gradients of every method held against a truth, on a user's own model and data."""
