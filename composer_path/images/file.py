"""An image file's bytes: check them, decode them to plain pixels, and strip all metadata for storage.

Whatever reads a picture goes through `open_image`, so the rules are the same at conversion, in training and
when a model is asked. What a file holds besides pixels (EXIF with a patient's name, XMP, comments, colour
profiles, thumbnails, bytes after the end) is never stored and never shown in an error.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from composer_path.images.jpeg import Jpeg, is_jpeg
from composer_path.records.rules import ImageError

# 16,384 px a side: 8 mm of a slide at 20x (0.5 um a pixel), far more than a region that is shown to a model,
# and 0.8 GB of RGB in a loader worker at worst. Pillow's own limit (0.18 G pixels) stays as it is, unused.
MAX_PIXELS = 2**28
# A longer strip is no field of view; its shorter side resized to the model's, it may not fit in memory.
MAX_ASPECT_RATIO = 256

# Only formats whose decoders are meant for untrusted pixels: Pillow would hand PostScript to an interpreter.
_FORMATS: tuple[tuple[str, Callable[[bytes], bool], type[ImageFile]], ...] = (
    ("JPEG", is_jpeg, JpegImageFile),
    ("PNG", lambda head: head.startswith(b"\x89PNG\r\n\x1a\n"), PngImageFile),
    ("TIFF", lambda head: head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImageFile),
    ("WebP", lambda head: head[:4] == b"RIFF" and head[8:12] == b"WEBP", WebPImageFile),
    ("BMP", lambda head: head.startswith(b"BM"), BmpImageFile),
    ("GIF", lambda head: head.startswith((b"GIF87a", b"GIF89a")), GifImageFile),
    ("JPEG 2000", lambda head: head.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")), Jpeg2KImageFile),
)

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# PNG: what pixels are made of. Everything else (text, eXIf, iCCP, tIME, gAMA, animation) is left out.
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
# Where an orientation may stand. Pillow finds it by decoding, so a file without these words is not asked.
_PNG_MAY_BE_TURNED = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageFile:
    """Read an image's header and check that it has no more than `max_pixels`; no pixel is decoded yet.

    Raises:
        ImageError: `unreadable-image`, `too-many-pixels` or `too-narrow`.
    """
    data = bytes(data)
    for name, accepts, image_class in _FORMATS:
        if not accepts(data[:16]):
            continue
        try:
            # The class itself rather than Image.open: no other plugin sees the bytes, and Pillow's
            # process-wide limit neither warns nor refuses before ours is asked.
            image = image_class(io.BytesIO(data))
        except Exception as error:  # a damaged header can raise anything; its message may quote the file
            raise _unreadable(name, data, error) from None
        _check_size(image.width, image.height, max_pixels)
        return image
    fix = f"store it as one of {', '.join(name for name, _, _ in _FORMATS)}"
    raise ImageError("unreadable-image", f"{len(data)} bytes that are no known image format", fix)


def decode_pixels(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image to upright pixels of mode "L", "RGB" or "I;16" (16-bit grey; `to_rgb` scales it).

    EXIF orientation is applied, transparency is composited on white, palette, CMYK and the rest become RGB. Of a file
    with several frames or pages the first is taken. Colour profiles are not applied (nor does the reference).

    Raises:
        ImageError: As `open_image`, and for data that can't be decoded in full.
    """
    image = open_image(data, max_pixels)
    _load(image, data)
    return _in_plain_mode(_upright(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Make 8-bit RGB of what `decode_pixels` gives; of 16-bit grey, 65535 becomes white and 0 black."""
    if image.mode == "I;16":
        image = Image.fromarray(_scale_to_8_bit(np.asarray(image)))
    return image if image.mode == "RGB" else image.convert("RGB")


def check_image(data: bytes, max_pixels: int = MAX_PIXELS) -> None:
    """Check that an image can be decoded in full, as fast as its format allows.

    A JPEG's entropy-coded data is read to the end but only an eighth of its pixels a side are made. One whose data end
    early is found, though decoders take it (see `Jpeg.complete`). Raises as `decode_pixels`.
    """
    image = open_image(data, max_pixels)
    if isinstance(image, JpegImageFile):
        _check_jpeg(image, Jpeg(bytes(data)), data)
    else:
        _load(image, data)
        _in_plain_mode(image)


def sanitize_image(data: bytes, max_pixels: int = MAX_PIXELS, decode: bool = True) -> bytes:
    """Make the bytes that are stored in a shard: the same pixels, and nothing else.

    1. Upright JPEG: metadata segments and whatever follows its end are dropped; coded data stay bit for bit.
    2. Upright PNG: only the chunks that make pixels are kept, bit for bit.
    3. Anything else (EXIF-rotated, TIFF, WebP, BMP, GIF, JPEG 2000): a lossless PNG of the decoded pixels.

    Of the result `decode_pixels` gives exactly the pixels it gives of `data`. With `decode` also what is kept bit for
    bit is decoded, which finds damage inside its compressed data; without, only the structure is read, from the header
    to the end marker. Raises as `check_image`.
    """
    data = bytes(data)
    image = open_image(data, max_pixels)
    if isinstance(image, JpegImageFile):
        jpeg = Jpeg(data, whole=not decode)
        upright = orientation_of(image) == 1
        stored = _check_jpeg(image, jpeg, data) if decode or not upright else jpeg.stripped()
        if upright:
            return stored
        image = open_image(data, max_pixels)  # not at an eighth
    if not decode and isinstance(image, PngImageFile) and not any(word in data for word in _PNG_MAY_BE_TURNED):
        return _strip_png(data, whole=True)
    _load(image, data)
    pixels = _in_plain_mode(_upright(image)).copy()  # a plain picture, which knows nothing of its file
    if isinstance(image, PngImageFile) and orientation_of(image) == 1:
        return _strip_png(data)
    file = io.BytesIO()
    pixels.info.clear()  # Pillow would write some of it back, e.g. the colour profile
    pixels.save(file, "PNG")
    return file.getvalue()


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; unreadable or senseless EXIF counts as upright."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF is common in the wild and says nothing about the pixels
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _check_size(width: int, height: int, max_pixels: int) -> None:
    size = f"an image of {width} x {height} pixels"
    if width < 1 or height < 1:
        raise ImageError("unreadable-image", size, "replace the file")
    if width * height > max_pixels:
        raise ImageError("too-many-pixels", size, f"crop it, or raise max_pixels (now {max_pixels})")
    longer, shorter = max(width, height), min(width, height)
    # Padding makes a square of the longer side: it must fit in memory as well.
    if longer > MAX_ASPECT_RATIO * shorter or longer**2 > max(max_pixels, MAX_PIXELS):
        fix = f"crop it (sides may differ by a factor of {MAX_ASPECT_RATIO} at most), or raise max_pixels"
        raise ImageError("too-narrow", f"{size}: its square would hold {longer**2} pixels", fix)


def _unreadable(name: str, data: bytes, error: Exception) -> ImageError:
    found = f"a {name} file of {len(data)} bytes that is truncated or damaged ({type(error).__name__})"
    return ImageError("unreadable-image", found, "replace the file")


def _load(image: ImageFile, data: bytes) -> None:
    try:
        image.load()
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error and more
        raise _unreadable(image.format or "image", data, error) from None


def _check_jpeg(image: JpegImageFile, jpeg: Jpeg, data: bytes) -> bytes:
    """The file without metadata, if all its pixels are there."""
    try:
        return jpeg.complete(image)
    except ImageError:
        raise
    except Exception as error:
        raise _unreadable("JPEG", data, error) from None


def _upright(image: Image.Image) -> Image.Image:
    # Pillow turns a TIFF itself while loading, and then no longer reports an orientation.
    orientation = orientation_of(image)
    return image if orientation == 1 else image.transpose(_UPRIGHT[orientation])


def _in_plain_mode(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError("unsupported-image", "floating-point pixels", "convert it to 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _plain_16_bit(image)
    try:
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        mode = "L" if image.mode in ("1", "L") else "RGB"
        return image if image.mode == mode else image.convert(mode)
    except (ValueError, OSError):
        found = f"pixels of mode {image.mode}"
        raise ImageError("unsupported-image", found, "convert it to 8-bit RGB or 16-bit grey") from None


def _plain_16_bit(image: Image.Image) -> Image.Image:
    levels = np.asarray(image)
    low, high = int(levels.min()), int(levels.max())
    if low < 0 or high > 65535:
        found = f"grey levels from {low} to {high}"
        raise ImageError("unsupported-image", found, "convert it to 16 bits (0 to 65535) or 8 bits")
    levels = levels.astype(np.uint16)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # PNG names one grey level as see-through
        return Image.fromarray(np.where(levels == transparent, 255, _scale_to_8_bit(levels)).astype(np.uint8))
    return Image.fromarray(levels)


def _scale_to_8_bit(levels: np.ndarray) -> np.ndarray:
    return ((levels.astype(np.uint32) + 128) // 257).astype(np.uint8)  # rounded; 65535 = 257 * 255


def _strip_png(data: bytes, whole: bool = False) -> bytes:
    kept = [_PNG_SIGNATURE]
    position = len(_PNG_SIGNATURE)
    while position + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        chunk = data[position : position + 12 + length]
        position += len(chunk)
        if kind in _PNG_PIXEL_CHUNKS:
            kept.append(chunk)
        if kind == b"IEND":
            whole = False
            break
    if whole:
        raise ImageError("unreadable-image", f"a PNG file of {len(data)} bytes that has no end", "replace the file")
    return b"".join(kept)
