"""An image file's bytes: check them, decode them to plain pixels, and strip all metadata for storage.

Whatever reads a picture goes through here, so the rules are the same at conversion, in training and when a model is
asked. Headers are read first, by code of ours; the decoder gets what makes pixels and nothing else. What a file holds
besides (EXIF with a patient's name, XMP, comments, colour profiles, thumbnails, bytes after the end) is never stored
and never shown in an error. Three answers are kept apart: damaged, unsupported, too large.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field

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

from composer_path.images import bmp, jpeg2000, kinds, png, tiff, webp
from composer_path.images.jpeg import Jpeg, is_jpeg
from composer_path.images.jpeg_frame import frame_of
from composer_path.images.levels import ODDITY
from composer_path.images.plain_pixels import TINY, oddities, plain_pixels, scale_to_8_bit
from composer_path.records.rules import ImageError

# 16,384 px a side: 8 mm of a slide at 20x (0.5 um a pixel), far more than a region that is shown to a model,
# and 0.8 GB of RGB in a loader worker at worst. Pillow's own limit (0.18 G pixels) stays as it is, unused.
MAX_PIXELS = 2**28
# A longer strip is no field of view; its shorter side resized to the model's, it may not fit in memory.
MAX_ASPECT_RATIO = 256

_TURNED = 14  # bytes for each pixel of a JPEG that doesn't lie upright
_EXIF_ORIENTATION = 0x0112
_PHOTOMETRIC = 262  # 0 where white is zero
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class _Header:
    """What is known of a file before its decoder sees it."""

    data: bytes  # what the decoder gets
    size: tuple[int, int] | None = None  # None: the decoder's own reading of the header says it, and takes no memory
    inverted: bool = False  # white is 0
    further: bool = False  # there are other pages or frames
    bytes_per_pixel: int = 12  # memory while it is examined and stored: decoded twice, and encoded
    scalable: bool = False  # a JPEG of DCT and Huffman codes
    deep: bool = False  # of 16 bits, of which the decoder gives the higher 8 where there are colours


@dataclass(frozen=True)
class StoredPicture:
    """What is stored of an image, and what is odd about it (see `ODDITIES`)."""

    data: bytes
    oddities: list[str] = field(default_factory=list)


def _jpeg_header(data: bytes) -> _Header:
    frame = frame_of(data)
    cost = 8 if not frame.scalable else 6 if frame.progressive else 1  # of progressive ones all coefficients are kept
    return _Header(data, (frame.width, frame.height), bytes_per_pixel=cost, scalable=frame.scalable)


def _png_header(data: bytes) -> _Header:
    light = png.pixel_chunks(data, turning=True)
    size = int.from_bytes(light[16:20]), int.from_bytes(light[20:24])
    cost = 10 if light[25] >= 4 or b"tRNS" in light[:2048] else 8  # what is see-through is laid on white
    return _Header(light, size, further=png.is_animated(data), bytes_per_pixel=cost, deep=light[24] == 16)


def _tiff_header(data: bytes) -> _Header:
    picture = tiff.picture_of(data)
    return _Header(picture.data, picture.size, picture.inverted, picture.num_others > 0, deep=picture.bits == 16)


def _webp_header(data: bytes) -> _Header:
    light, size, further = webp.pixel_chunks(data)
    return _Header(light, size, further=further, bytes_per_pixel=24)  # libwebp keeps two frames besides


def _bmp_header(data: bytes) -> _Header:
    bmp.check_bmp(data)
    return _Header(data)


def _jpeg2000_header(data: bytes) -> _Header:
    width, height, bits = jpeg2000.size_of(data)
    return _Header(data, (width, height), bytes_per_pixel=20, deep=bits == 16)


# Only formats whose decoders are meant for untrusted pixels: Pillow would hand PostScript to an interpreter.
_FORMATS: tuple[tuple[str, Callable[[bytes], bool], type[ImageFile], Callable[[bytes], _Header]], ...] = (
    ("JPEG", is_jpeg, JpegImageFile, _jpeg_header),
    ("PNG", lambda head: head.startswith(png.SIGNATURE), PngImageFile, _png_header),
    ("TIFF", lambda head: head.startswith(tiff.STARTS), TiffImageFile, _tiff_header),
    ("WebP", lambda head: head[:4] == b"RIFF" and head[8:12] == b"WEBP", WebPImageFile, _webp_header),
    ("BMP", lambda head: head.startswith(b"BM"), BmpImageFile, _bmp_header),
    ("GIF", lambda head: head.startswith((b"GIF87a", b"GIF89a")), GifImageFile, _Header),
    ("JPEG 2000", lambda head: head.startswith(jpeg2000.STARTS), Jpeg2KImageFile, _jpeg2000_header),
)
READABLE = ", ".join(name for name, _, _, _ in _FORMATS)


def _any(num_bytes: int) -> None:
    """Allow as much memory as a picture takes."""


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageFile:
    """Read an image's header and check that it has no more than `max_pixels`; no pixel is decoded yet.

    Raises:
        ImageError: `unreadable-image`, `unsupported-image`, `too-many-pixels` or `too-narrow`.
    """
    return _open(bytes(data), max_pixels)[0]


def memory_of(data: bytes, max_pixels: int = MAX_PIXELS) -> int:
    """Bytes that it takes at most to examine an image; raises as `open_image`."""
    data = bytes(data)
    return _memory(*_open(data, max_pixels), data)


def decode_pixels(data: bytes, max_pixels: int = MAX_PIXELS, scale_levels: bool = False) -> Image.Image:
    """Decode an image to upright pixels of mode "L", "RGB" or "I;16" (16-bit grey; `to_rgb` scales it).

    EXIF orientation is applied, transparency is composited on white, palette, CMYK and the rest become RGB. Of a file
    with several frames or pages the first is taken, of a TIFF file the first that is no thumbnail. Colour profiles are
    not applied (nor does the reference). `scale_levels` takes 16-bit levels below 4,096 for 12 bits.

    Raises:
        ImageError: As `open_image`, and for data that can't be decoded in full.
    """
    return decode_picture(data, max_pixels, scale_levels)[0]


def decode_picture(
    data: bytes, max_pixels: int = MAX_PIXELS, scale_levels: bool = False
) -> tuple[Image.Image, list[str]]:
    """What `decode_pixels` gives, and what is odd about it."""
    image, header = _open(bytes(data), max_pixels)
    return _decoded(image, header, data, scale_levels)


def to_rgb(image: Image.Image) -> Image.Image:
    """Make 8-bit RGB of what `decode_pixels` gives; of 16-bit grey, 65535 becomes white and 0 black."""
    if image.mode == "I;16":
        image = Image.fromarray(scale_to_8_bit(np.asarray(image)))
    return image if image.mode == "RGB" else image.convert("RGB")


def pixels_of(image: Image.Image, max_pixels: int = MAX_PIXELS, scale_levels: bool = False) -> Image.Image:
    """8-bit RGB of a picture that somebody has opened with Pillow, as of its file; the picture stays as it is.

    Raises:
        ImageError: Too large, or it can't be decoded or made plain.
    """
    _check_size(image.width, image.height, max_pixels)
    inverted = image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
    try:
        image.load()
    except Exception as error:
        raise _unreadable(getattr(image, "format", None) or "image", b"", error) from None
    orientation = orientation_of(image)
    upright = image if orientation == 1 else image.transpose(_UPRIGHT[orientation])
    return to_rgb(plain_pixels(upright, scale_levels, inverted)[0])


def check_image(data: bytes, max_pixels: int = MAX_PIXELS, allow: Callable[[int], None] = _any) -> list[str]:
    """Check that an image can be decoded in full, as fast as its format allows; returns its oddities.

    A JPEG's entropy-coded data is read to the end but only an eighth of its pixels a side are made. One whose data end
    early is found, though decoders take it (see `Jpeg.complete`). Raises as `decode_pixels`. `allow` is told how many
    bytes of memory that takes, before it is done, and may raise.
    """
    data = bytes(data)
    image, header = _open(data, max_pixels)
    allow(_memory(image, header, data))
    if isinstance(image, JpegImageFile) and header.scalable:
        return _checked_jpeg(image, data)[1]
    return _decoded(image, header, data)[1]


def sanitize_image(data: bytes, max_pixels: int = MAX_PIXELS, decode: bool = True) -> bytes:
    """The bytes of `examine_image`; without `decode`, where that does, those of `stored_by_structure`."""
    stored = None if decode else stored_by_structure(data, max_pixels)
    return examine_image(data, max_pixels).data if stored is None else stored


def stored_by_structure(data: bytes, max_pixels: int = MAX_PIXELS) -> bytes | None:
    """What `examine_image` stores of a file that is kept bit for bit, decoding no pixel; None if that doesn't do.

    Damage inside of compressed data is missed. A file without an end marker is decoded instead, so that the answer is
    the same. Raises as `open_image`.
    """
    data = bytes(data)
    image, header = _open(data, max_pixels)
    if header.scalable and orientation_of(image) == 1:
        jpeg = Jpeg(data)
        return jpeg.stripped() if jpeg.ended else None
    if isinstance(image, PngImageFile) and png.has_end(data):
        stored = png.pixel_chunks(data)
        return stored if stored == header.data else None
    return None


def examine_image(
    data: bytes, max_pixels: int = MAX_PIXELS, scale_levels: bool = False, allow: Callable[[int], None] = _any
) -> StoredPicture:
    """Decode an image, and make the bytes that are stored in a shard: the same pixels, and nothing else.

    1. Upright JPEG of DCT and Huffman codes: metadata segments and whatever follows its end are dropped; coded data
       stay bit for bit.
    2. Upright PNG: only the chunks that make pixels are kept, bit for bit.
    3. Anything else (EXIF-rotated, lossless JPEG, TIFF, WebP, BMP, GIF, JPEG 2000): a lossless PNG of the pixels.

    Of the result `decode_pixels` gives exactly the pixels it gives of `data`. `allow`, and what is raised, are those of
    `check_image`.
    """
    data = bytes(data)
    image, header = _open(data, max_pixels)
    allow(_memory(image, header, data))
    upright = orientation_of(image) == 1
    if isinstance(image, JpegImageFile) and header.scalable:
        stored, odd = _checked_jpeg(image, data)
        if upright:
            return StoredPicture(stored, odd)
        image, header = _open(data, max_pixels)  # not at an eighth
    pixels, odd = _decoded(image, header, data, scale_levels)
    if isinstance(image, PngImageFile) and upright and not (scale_levels and ODDITY in odd):
        return StoredPicture(png.pixel_chunks(data), odd)
    file = io.BytesIO()
    pixels.info.clear()  # Pillow would write some of it back, e.g. the colour profile
    pixels.save(file, "PNG")
    return StoredPicture(file.getvalue(), odd)


def _memory(image: ImageFile, header: _Header, data: bytes) -> int:
    cost = header.bytes_per_pixel
    if header.scalable and orientation_of(image) != 1:  # made whole, turned, and stored as PNG
        cost = max(cost, _TURNED)
    return cost * image.width * image.height + 3 * len(data)


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; unreadable or senseless EXIF counts as upright."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF is common in the wild and says nothing about the pixels
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _open(data: bytes, max_pixels: int) -> tuple[ImageFile, _Header]:
    for name, accepts, image_class, read_header in _FORMATS:
        if not accepts(data[:16]):
            continue
        header = read_header(data)
        if header.size is not None:
            _check_size(*header.size, max_pixels)
        try:
            # The class itself rather than Image.open: no other plugin sees the bytes, and Pillow's
            # process-wide limit neither warns nor refuses before ours is asked.
            image = image_class(io.BytesIO(header.data))
        except Exception as error:  # a damaged header can raise anything; its message may quote the file
            raise _unreadable(name, data, error) from None
        _check_size(image.width, image.height, max_pixels)
        return image, header
    raise kinds.refused(data, READABLE)


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


def _unreadable(name: str, data: bytes, error: Exception) -> Exception:
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return MemoryError()  # says nothing of the file
    if name == "TIFF" and isinstance(error, SyntaxError):  # the directory was whole: its pixels are of another kind
        return ImageError("unsupported-image", tiff.layout_of(data), "save it as 8-bit RGB or 16-bit grey")
    found = f"a {name} file of {len(data)} bytes that is truncated or damaged ({type(error).__name__})"
    return ImageError("unreadable-image", found, "replace the file")


def _decoded(
    image: ImageFile, header: _Header, data: bytes, scale_levels: bool = False
) -> tuple[Image.Image, list[str]]:
    """Plain upright pixels and their oddities."""
    try:
        further = header.further or (isinstance(image, GifImageFile) and image.is_animated)
        image.load()
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error and more
        raise _unreadable(image.format or "image", data, error) from None
    # Pillow turns a TIFF itself while loading, and then no longer reports an orientation.
    orientation = orientation_of(image)
    upright = image if orientation == 1 else image.transpose(_UPRIGHT[orientation])
    pixels, odd = plain_pixels(upright, scale_levels, header.inverted)
    if header.deep and pixels.mode == "RGB" and max(high for _, high in pixels.getextrema()) < 16:  # type: ignore[misc]
        if scale_levels:
            raise ImageError("unsupported-image", "16-bit colours with levels below 4,096", "scale them to 8 bits")
        odd = [*odd, ODDITY]
    return pixels, [*odd, *(["further_pages"] if further else [])]


def _checked_jpeg(image: JpegImageFile, data: bytes) -> tuple[bytes, list[str]]:
    """The file without metadata, if all its pixels are there, and its oddities."""
    size = image.size
    try:
        stored = Jpeg(data).complete(image)
    except ImageError:
        raise
    except Exception as error:
        raise _unreadable("JPEG", data, error) from None
    image.tile = []  # an eighth of its pixels are there, and no more shall be read
    odd = [one for one in oddities(image) if one != "tiny"]
    return stored, [*(["tiny"] if min(size) < TINY else []), *odd]
