"""Checkpoints: what a run goes on from. Nothing in one is executed, and a damaged one is never taken."""
