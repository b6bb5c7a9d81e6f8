"""Algorithms that Composer runs inside the training loop, named in the YAML's section `algorithms`.

To add one: a file here with a `composer.core.Algorithm`, and its class in `__all__`. The YAML's key is the class's name
in snake_case (`run/names.py`), its keywords are those of `__init__`.
"""

from composer_path.algorithms.stain_jitter import StainJitter

__all__ = ["StainJitter"]
