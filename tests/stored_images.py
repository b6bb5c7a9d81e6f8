"""Images as shards hold them, with the settings of `ImagePreparation` one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from composer_path.images.file import MAX_PIXELS
from composer_path.images.pixels import PAD_COLOR, ImagePreparation


def load_stored_image(
    data: bytes, image_size: int, fit: Any = "pad", decoder: Any = "pil", pad_color: Sequence[int] = PAD_COLOR
) -> Tensor:
    """The pixels of a stored file or finished square."""
    red, green, blue = pad_color
    return ImagePreparation(image_size, fit, decoder, (red, green, blue)).load_stored(data)


def resize_image(
    data: bytes,
    image_size: int,
    fit: Any = "pad",
    pad_color: Sequence[int] = PAD_COLOR,
    max_pixels: int = MAX_PIXELS,
) -> bytes:
    """The finished square of an image file."""
    red, green, blue = pad_color
    return ImagePreparation(image_size, fit, pad_color=(red, green, blue), max_pixels=max_pixels).resize(data)
