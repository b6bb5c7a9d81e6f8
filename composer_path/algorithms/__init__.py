"""Algorithms that Composer runs inside the training loop, named in the YAML's section `algorithms`.

To add one: a file here with a `composer.core.Algorithm`, and its class in `__all__`. The YAML's key is the class's name
in snake_case (`run/names.py`), its keywords are those of `__init__`.
"""

from composer_path.algorithms.dihedral import Dihedral
from composer_path.algorithms.ema import EMA
from composer_path.algorithms.image_dropout import ImageDropout
from composer_path.algorithms.mpp_jitter import MppJitter
from composer_path.algorithms.neftune import Neftune
from composer_path.algorithms.stain_jitter import StainJitter
from composer_path.algorithms.stain_transfer import StainTransfer
from composer_path.algorithms.unfreeze import Unfreeze

__all__ = [
    "EMA",
    "Dihedral",
    "ImageDropout",
    "MppJitter",
    "Neftune",
    "StainJitter",
    "StainTransfer",
    "Unfreeze",
]
