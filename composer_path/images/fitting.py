"""A picture as a square of a model's size: decoded to RGB, padded or cropped, resized; arrays, no tensors."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from composer_path.images.file import MAX_PIXELS, decode_pixels, open_image, orientation_of, to_rgb
from composer_path.images.jpeg_frame import frame_of
from composer_path.images.jpeg_pixels import jpeg_pixels
from composer_path.images.stored_square import Fit


def plain_jpeg_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int] | None:
    """Width and height of an upright grey or colour JPEG of the usual kind, None of others; raises as `open_image`."""
    header = open_image(data, max_pixels)
    if header.format != "JPEG" or header.mode not in ("L", "RGB") or orientation_of(header) != 1:
        return None
    return header.size if frame_of(data).scalable else None


def rgb_image(data: bytes, max_pixels: int = MAX_PIXELS, scale_levels: bool = False) -> Image.Image:
    """Decode an image file to upright 8-bit RGB, with Pillow's pixels; raises as `decode_pixels`."""
    pixels = jpeg_pixels(data, "RGBX") if plain_jpeg_size(data, max_pixels) else None  # as Pillow lays them in memory
    if pixels is None:
        return to_rgb(decode_pixels(data, max_pixels, scale_levels))
    height, width, _ = pixels.shape
    return Image.frombytes("RGB", (width, height), pixels, "raw", "RGBX")  # type: ignore[arg-type]


def fit_square(
    image: Image.Image, image_size: int, fit: Fit, pad_color: tuple[int, int, int]
) -> UInt8[np.ndarray, "3 size size"]:
    """Pad to a square of the longer side, resize the shorter side to `image_size`, cut out the centre.

    `pad_color` is the vision encoder's mean in 8 bits: `pad_color_of` of pixels.py.
    """
    if fit == "pad" and image.width != image.height:
        side = max(image.size)
        square = Image.new("RGB", (side, side), pad_color)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    image = image.resize(resized_size(*image.size, image_size), Image.Resampling.BICUBIC)
    # One after the other numpy lays out colours twice as fast as torch does.
    pixels = np.array(np.asarray(image).transpose(2, 0, 1), order="C")
    _, height, width = pixels.shape
    top, left = (height - image_size) // 2, (width - image_size) // 2
    return np.ascontiguousarray(pixels[:, top : top + image_size, left : left + image_size])


def resized_size(width: int, height: int, image_size: int) -> tuple[int, int]:
    """Width and height once the shorter side is `image_size`; the longer is cut to an integer."""
    if width <= height:
        return image_size, int(image_size * height / width)
    return int(image_size * width / height), image_size
