"""Pictures as harnesses hold them, in the form in which ours are read."""

from __future__ import annotations

import io

from PIL import Image

_OF_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")


def file_of(image: Image.Image) -> bytes:
    """An image file with a picture's very pixels, and the side that is up; raises `OSError` where it is damaged."""
    orientation = image.getexif()
    image = image if image.mode in _OF_PNG else image.convert("RGB")
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1, exif=orientation)
    return file.getvalue()
