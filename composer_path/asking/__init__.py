"""Asking a trained model, and measuring its answers."""
