"""Measuring a trained model on questions whose answers are known."""
