"""Weights in files: one module for each format, and how a model is put together with them."""
