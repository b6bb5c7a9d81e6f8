"""Algorithms that Composer runs inside the training loop, named in the YAML's section `algorithms`."""

from composer_path.algorithms.stain_jitter import StainJitter

__all__ = ["StainJitter"]
