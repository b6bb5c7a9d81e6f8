"""A JPEG file's pixels at once, where simplejpeg is installed: those that Pillow and torchvision give, sooner.

All three decode with libjpeg-turbo. Pillow asks for a strip at a time and torchvision copies the file. Only a flawless
file is decoded here: what raises the least doubt is left to the decoder that was chosen, so that verdicts stay its own.
(What simplejpeg does faster still is not the same picture: made smaller while decoding it is 17 grey levels off after
resizing, with plain upsampling of colours 8, with the fast cosine transform 5.)
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import features


def jpeg_pixels(data: bytes, channels: Literal["RGB", "RGBX"]) -> UInt8[np.ndarray, "height width channels"] | None:
    """The pixels of an upright grey or colour JPEG whose header was checked; None if another decoder must decide."""
    decode = _decoder()
    if decode is None:
        return None
    try:
        return decode(data, channels, strict=True)
    except ValueError:  # of a damaged file, and of one that it doesn't know
        return None


@cache
def _decoder() -> Any:
    if not features.check_feature("libjpeg_turbo"):  # other libraries round in other ways
        return None
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg.decode_jpeg
