"""Samples, and the padding-free batches that they are laid into."""
