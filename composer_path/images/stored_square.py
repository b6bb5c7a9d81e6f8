"""Finished squares in place of image files: what `--resize` stores, so that training decodes nothing.

A square is a header of 16 bytes and the pixels, one colour after the other (3 x side x side bytes): 602 kB at 448. They
are not compressed: as PNG, dense tissue is a fifth smaller and takes 5 ms to read instead of 0.03 ms.

Arrays, no tensors: whoever converts or looks into shards then needn't wait for torch to be imported.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import UInt8

from composer_path.records.rules import ImageError

Fit = Literal["pad", "crop"]

# No image format begins so. The first byte is no text, and a transfer that changes line ends breaks the rest.
_MAGIC = b"\xc5CPSQ\r\n\x1a"
_VERSION = 1
_HEADER = struct.Struct("<8sBBHBBBx")  # magic, version, fit, side, red, green, blue of the padding


class ResizedMismatch(ValueError):
    """The shards hold squares of another size or fit than the model wants: every sample is wrong, so a run must end."""


@dataclass(frozen=True)
class Square:
    """How a stored square was made: the settings of the `ImagePreparation` (images/pixels.py) that made it.

    The padding colour is the encoder's mean in 8 bits (`pad_color_of` in pixels.py), (123, 116, 103) where no other
    is given; `crop` pads nothing and has none.
    """

    image_size: int
    fit: Fit
    pad_color: tuple[int, int, int] | None

    @classmethod
    def of(cls, image_size: int, fit: Fit, pad_color: Sequence[int] | None) -> Square:
        """Make one; the colour counts only where there is padding."""
        if fit not in get_args(Fit):
            raise ValueError(f"fit must be 'pad' or 'crop', found {fit!r}")
        if fit == "crop" or pad_color is None:
            return cls(image_size, fit, None)
        red, green, blue = (int(channel) for channel in pad_color)
        return cls(image_size, fit, (red, green, blue))

    def __str__(self) -> str:
        color = "" if self.pad_color is None else f", pad_color {list(self.pad_color)}"
        return f"image_size {self.image_size}, fit {self.fit}{color}"


def is_square(data: bytes | memoryview) -> bool:
    """Whether a stored image is a finished square and no image file."""
    return data[: len(_MAGIC)] == _MAGIC


def pack_square(pixels: UInt8[np.ndarray, "3 size size"], square: Square) -> bytes:
    """Join header and pixels; `unpack_square` gives the same array back."""
    color = (0, 0, 0) if square.pad_color is None else square.pad_color
    header = _HEADER.pack(_MAGIC, _VERSION, get_args(Fit).index(square.fit), square.image_size, *color)
    return header + pixels.tobytes()


def square_of(data: bytes | memoryview) -> Square:
    """Read a square's header.

    Raises:
        ImageError: `unreadable-image`, its bytes are not as many as its header says.
        ResizedMismatch: A later version of composer_path wrote it.
    """
    version, fit, side, *color = _HEADER.unpack(data[: _HEADER.size])[1:] if len(data) >= _HEADER.size else (0,) * 6
    if version > _VERSION:
        raise ResizedMismatch(
            f"resized images must be of version {_VERSION}, found {version}; update composer_path, or convert again"
        )
    if version < 1 or fit >= len(get_args(Fit)) or len(data) != _HEADER.size + 3 * side * side:
        found = f"a resized image of {len(data)} bytes that is truncated or damaged"
        raise ImageError("unreadable-image", found, "convert the data again")
    return Square.of(side, get_args(Fit)[fit], color)


def unpack_square(data: bytes | memoryview, wanted: Square) -> UInt8[np.ndarray, "3 size size"]:
    """A square's pixels; raises as `square_of`, and `ResizedMismatch` for one that the model doesn't want."""
    found = square_of(data)
    if found != wanted:
        raise ResizedMismatch(
            f"the model wants images with {wanted}; the shards hold images resized to {found}: convert the data again "
            "with --resize for this model, or without it"
        )
    # Copied: the bytes may not be written to, an array may.
    pixels = np.frombuffer(bytearray(memoryview(data)[_HEADER.size :]), dtype=np.uint8)
    return pixels.reshape(3, wanted.image_size, wanted.image_size)
