"""Decoded pixels as they are stored: upright, of mode "L", "RGB" or 16-bit grey; and what is odd about them.

Large pictures are worked on in bands of rows, so that no more than two of them are in memory at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

from composer_path.images.levels import ODDITY
from composer_path.records.rules import ImageError

# What is counted of pictures that may be right, and are often a mistake.
ODDITIES = {
    ODDITY: "16-bit images with levels below 4,096 (--scale-levels)",
    "transparent": "images that are fully transparent",
    "one_color": "images of one flat colour",
    "tiny": "images of fewer than 16 pixels a side",
    "further_pages": "images with further pages or frames, left out",
}
TINY = 16
_BAND = 2**22  # pixels
_WHITE = 65535


def plain_pixels(
    image: Image.Image, scale_levels: bool = False, inverted: bool = False
) -> tuple[Image.Image, list[str]]:
    """An image in a plain mode, and its oddities. `scale_levels` takes levels below 4,096 for 12 bits.

    Raises:
        ImageError: `unsupported-image`.
    """
    if image.mode == "F":
        raise ImageError("unsupported-image", "floating-point pixels", "convert it to 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _plain_16_bit(image, scale_levels, inverted)
    try:
        if image.has_transparency_data:
            return _on_white(image)
        mode = "L" if image.mode in ("1", "L") else "RGB"
        plain = image if image.mode == mode else image.convert(mode)
    except (ValueError, OSError):
        found = f"pixels of mode {image.mode}"
        raise ImageError("unsupported-image", found, "convert it to 8-bit RGB or 16-bit grey") from None
    return plain, oddities(plain)


def oddities(image: Image.Image) -> list[str]:
    """What is odd about a picture in a plain mode."""
    found = ["tiny"] if min(image.size) < TINY else []
    extrema = image.getextrema()
    pairs = extrema if isinstance(extrema[0], tuple) else (extrema,)
    return [*found, "one_color"] if all(low == high for low, high in pairs) else found  # type: ignore[misc]


def scale_to_8_bit(levels: np.ndarray) -> np.ndarray:
    """8 bits of 16, rounded; 65535 = 257 * 255."""
    scaled = np.empty(levels.shape, np.uint8)
    for rows in _bands(levels.shape[1], levels.shape[0]):
        scaled[rows] = (levels[rows].astype(np.uint32) + 128) // 257
    return scaled


def _bands(width: int, height: int) -> Iterator[slice]:
    step = max(1, _BAND // width)
    return (slice(top, min(top + step, height)) for top in range(0, height, step))


def _on_white(image: Image.Image) -> tuple[Image.Image, list[str]]:
    plain, transparent = Image.new("RGB", image.size), True
    for rows in _bands(*image.size):
        box = (0, rows.start, image.width, rows.stop)
        band = image.crop(box).convert("RGBA")
        transparent = transparent and band.getchannel("A").getextrema()[1] == 0
        white = Image.new("RGBA", band.size, "white")
        plain.paste(Image.alpha_composite(white, band).convert("RGB"), box)
    return plain, [*(["transparent"] if transparent else []), *oddities(plain)]


def _plain_16_bit(image: Image.Image, scale_levels: bool, inverted: bool) -> tuple[Image.Image, list[str]]:
    levels = np.asarray(image)
    low, high = int(levels.min()), int(levels.max())
    if low < 0 or high > _WHITE:
        grey = f"grey levels from {low} to {high}"
        raise ImageError("unsupported-image", grey, "convert it to 16 bits (0 to 65535) or 8 bits")
    levels = levels.astype(np.uint16)  # a copy, in this machine's order of bytes
    found = ["tiny"] if min(image.size) < TINY else []
    found += ["one_color"] if low == high else []
    transparent = image.info.get("transparency")
    if 0 < high < 4096:
        found.append(ODDITY)
        if scale_levels:
            for rows in _bands(*image.size):
                levels[rows] = (levels[rows].astype(np.uint32) * _WHITE + 2047) // 4095
            transparent = (transparent * _WHITE + 2047) // 4095 if isinstance(transparent, int) else None
    if inverted:
        np.subtract(_WHITE, levels, out=levels)
    if isinstance(transparent, int):  # PNG names one grey level as see-through
        gray = scale_to_8_bit(levels)
        gray[levels == transparent] = 255
        return Image.fromarray(gray), found
    return Image.fromarray(levels), found
