"""What is looked at of a picture: its size, a hash of its pixels, how bright it is, and a small copy for the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
import xxhash
from PIL import Image

from composer_path.images.file import decode_pixels, to_rgb

SIDE = 112  # of a thumbnail, in pixels


@dataclass(frozen=True)
class Thumbnail:
    """A small copy of a picture; it holds pixels and nothing else of the file."""

    rank: int  # by which the few that are shown are drawn
    where: str  # the record's place
    index: int  # of the picture in its record
    width: int
    height: int
    jpeg: bytes

    @property
    def address(self) -> str:
        """The copy itself, as a page holds it."""
        return "data:image/jpeg;base64," + base64.b64encode(self.jpeg).decode("ascii")


@dataclass(frozen=True)
class Picture:
    """A decoded picture."""

    pixels: Image.Image
    hash: int  # of its size and pixels: equal pictures in two formats have one

    @property
    def width(self) -> int:
        """In pixels."""
        return self.pixels.width

    @property
    def height(self) -> int:
        """In pixels."""
        return self.pixels.height

    @property
    def brightness(self) -> float:
        """Mean of its levels, 0 to 255."""
        return float(np.asarray(self.pixels.resize((1, 1), Image.Resampling.BOX).convert("L"))[0, 0])

    def thumbnail(self, rank: int, where: str, index: int) -> Thumbnail:
        """Its small copy."""
        small = self.pixels.copy()
        small.thumbnail((SIDE, SIDE))
        file = io.BytesIO()
        small.save(file, "JPEG", quality=75)
        return Thumbnail(rank, where, index, self.width, self.height, file.getvalue())


def picture_of(data: bytes) -> Picture:
    """Decode a stored image, which has been checked."""
    pixels = to_rgb(decode_pixels(data))
    return Picture(pixels, xxhash.xxh64_intdigest(f"{pixels.size}".encode() + pixels.tobytes()))
