"""A TIFF file's directories: which page is the picture, whether it is read, and the tags that make its pixels.

The decoder gets the file with a directory of our own, which holds those tags alone: profiles, EXIF and vendors' tags,
however long or wrong, say nothing of the pixels. Tags: TIFF Revision 6.0; BigTIFF: its "II+" header of 64-bit places.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from mmap import mmap

import numpy as np
from PIL import __version__ as pillow_version

from composer_path.records.rules import ImageError

STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_SUBFILE, _OLD_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 255, 256, 257, 258, 259, 262
_SAMPLES, _TILE_WIDTH, _SAMPLE_FORMAT, _NDPI = 277, 322, 339, 65420
_ROWS, _TILE_HEIGHT, _PLANES, _COLORS, _DEPTH = 278, 323, 284, 320, 32997
_STRIPS, _TILES = (273, 279), (324, 325)  # where they lie, and how long they are
# Of a page: bits, order of bits, strips, orientation, rows, planes, options of T.4, predictor, colours, tiles, extra
# samples, their format, JPEG tables, and YCbCr.
_PIXEL_TAGS = {_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, 266, 273, 274, _SAMPLES, 278, 279, 284, 292, 293}
_PIXEL_TAGS |= {317, 320, _TILE_WIDTH, 323, 324, 325, 338, _SAMPLE_FORMAT, 347, 529, 530, 531, 532}
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _PALETTE, _YCBCR = 0, 1, 3, 6
_JPEG = 7
_READ = (1, 5, _JPEG, 8, 32773, 32946)  # none, LZW, JPEG, Deflate, PackBits, old Deflate
# Of damaged fax data libtiff makes pixels out of whatever lay in memory, and says nothing.
_COMPRESSIONS = {
    **{
        2: "CCITT RLE",
        3: "CCITT group 3",
        4: "CCITT group 4",
        6: "old-style JPEG",
        9: "JBIG",
        10: "JBIG",
        34661: "JBIG",
        32809: "ThunderScan",
        34676: "SGI Log",
    },
    **{33003: "JPEG 2000", 33004: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000", 34887: "LERC"},
    **{34892: "lossy DNG JPEG", 34925: "LZMA", 34926: "Zstd", 50000: "Zstd", 34927: "WebP", 50001: "WebP"},
    **{50002: "JPEG XL", 52546: "JPEG XL", 22610: "JPEG XR", 34934: "JPEG XR", 32771: "CCITT RLE"},
}
_PHOTOMETRICS = {
    4: "a mask",
    8: "L*a*b* colours",
    9: "L*a*b* colours",
    10: "L*a*b* colours",
    32803: "a camera's raw data",
}
_SIGNED = 2
_FORMATS = {_SIGNED: "signed samples", 3: "floating-point samples", 5: "complex samples", 6: "complex samples"}
# Types of whole numbers.
_NUMBERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
_SIZES = {kind: struct.calcsize(f"<{form}") for kind, form in _NUMBERS.items()}
_FIRST = 8  # of several numbers so many are looked at
_MAX_PAGES, _MAX_TAGS = 256, 1024
# A page is a thumbnail of a later one that has so many times its pixels and nearly its shape.
_THUMBNAIL, _SHAPE = 4, 0.02
_FIX = "save it with 8 or 16 unsigned bits, compressed with LZW, Deflate, JPEG or not at all"


@dataclass(frozen=True)
class _Page:
    """One directory: for each tag its entry's bytes, and the first of its numbers."""

    entries: dict[int, bytes]
    numbers: dict[int, tuple[int, ...]]

    def first(self, tag: int, default: int) -> int:
        return self.numbers.get(tag, (default,))[0]

    @property
    def size(self) -> tuple[int, int]:
        return self.first(_WIDTH, 0), self.first(_HEIGHT, 0)

    @property
    def reduced(self) -> bool:
        """Whether it says that it is a thumbnail or a mask."""
        return bool(self.first(_SUBFILE, 0) & 5) or self.first(_OLD_SUBFILE, 1) == 2

    @property
    def bits(self) -> tuple[int, ...]:
        return self.numbers.get(_BITS, (1,))


@dataclass(frozen=True)
class TiffPicture:
    """What is decoded of a TIFF file."""

    data: bytes
    size: tuple[int, int]
    inverted: bool  # white is 0, and the decoder hasn't been told
    bits: int
    num_others: int  # further pages that are no thumbnails


def picture_of(data: bytes) -> TiffPicture:
    """Choose the page and check it.

    Of pages that say whether they are thumbnails the first that isn't; a much larger one of the same shape before it.

    Raises:
        ImageError: `unsupported-image`, or `unreadable-image` where a directory is missing or cut.
    """
    reader = _Reader(data)
    pages = reader.pages()
    page = _choose(pages)
    if data.startswith(STARTS[3]):  # Pillow takes its places for those of a small one
        raise _unsupported("of 64-bit places in big-endian order")
    if _NDPI in page.entries:
        fix = "name a region of it with x, y, width and height, or export it as PNG"
        raise ImageError("unsupported-image", "a Hamamatsu NDPI slide", fix)
    _check(page)
    reader.check_extent(page)
    gray16 = page.bits == (16,) and page.first(_PHOTOMETRIC, 1) == _WHITE_IS_ZERO
    light = reader.with_directory(page, _BLACK_IS_ZERO if gray16 else None)
    others = sum(not other.reduced for other in pages) - (not page.reduced) + (page.first(_DEPTH, 1) > 1)
    return TiffPicture(light, page.size, gray16, page.bits[0], others)


def is_in_strips(data: bytes | mmap) -> bool:
    """Whether these are the bytes of a TIFF file without tiles."""
    if data[:4] not in STARTS:
        return False
    try:
        return all(_TILE_WIDTH not in page.entries for page in _Reader(data).pages())
    except ImageError:
        return False


def _choose(pages: list[_Page]) -> _Page:
    whole = [page for page in pages if not page.reduced] or pages[:1]
    first = whole[0]
    width, height = first.size

    def dwarfs(other: _Page) -> bool:
        other_width, other_height = other.size
        same_shape = abs(width * other_height - height * other_width) <= _SHAPE * width * other_height
        return same_shape and other_width * other_height >= _THUMBNAIL * width * height

    return max(filter(dwarfs, whole), key=lambda page: page.size[0] * page.size[1], default=first)


def _check(page: _Page) -> None:
    width, height = page.size
    compression, photometric = page.first(_COMPRESSION, 1), page.first(_PHOTOMETRIC, -1)
    num_samples = page.first(_SAMPLES, 1)
    if compression not in _READ:
        raise _unsupported(f"compressed with {_COMPRESSIONS.get(compression, f'method {compression}')}")
    for kind in page.numbers.get(_SAMPLE_FORMAT, (1,)):
        # Of signed greys the levels tell whether they are any; 8 bits the decoder takes for unsigned ones.
        if kind in _FORMATS and not (kind == _SIGNED and page.bits in ((16,), (32,))):
            raise _unsupported(f"with {_FORMATS[kind]}")
    if photometric in _PHOTOMETRICS:
        raise _unsupported(f"that holds {_PHOTOMETRICS[photometric]}")
    if len(set(page.bits)) > 1 or max(page.bits) > 32 or num_samples > 6 or num_samples < 1:
        raise _unsupported(f"of {num_samples} samples of {max(page.bits)} bits")
    if page.bits[0] > 8 and num_samples > 1 and page.first(_PLANES, 1) == 2:  # Pillow takes bytes for samples
        raise _unsupported(f"of {page.bits[0]} bits in separate planes")
    if compression == _JPEG and page.bits[0] != 8:
        raise _unsupported(f"compressed as JPEG of {page.bits[0]} bits")
    # CVE-2026-4775: libtiff's own conversion of YCbCr writes out of bounds. JPEG's is libjpeg's.
    if photometric == _YCBCR and compression != _JPEG and not ycbcr_is_safe(pillow_version):
        raise _unsupported(f"in YCbCr, which Pillow {pillow_version} may not survive")
    if width < 1 or height < 1:
        raise ImageError("unreadable-image", f"an image of {width} x {height} pixels", "replace the file")


def ycbcr_is_safe(version: str) -> bool:
    """Whether this Pillow comes with the libtiff that mends CVE-2026-4775: 12.2.0 doesn't yet."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) >= (12, 3)


def layout_of(data: bytes) -> str:
    """In words what a file's pixels are, where the decoder knows no such."""
    page = _choose(_Reader(data).pages())
    return (
        f"a TIFF file of {page.first(_SAMPLES, 1)} samples of {page.bits[0]} bits, "
        f"photometric interpretation {page.first(_PHOTOMETRIC, -1)}"
    )


class _Reader:
    """The directories of a file."""

    def __init__(self, data: bytes | mmap) -> None:
        self._data, self._big = data, data[2:4] in (b"+\0", b"\0+")
        self._order = "<" if data[:2] == b"II" else ">"
        self._places = "Q" if self._big else "I"
        self._first = 8 if self._big else 4  # where the place of the first directory stands
        self._entry = 20 if self._big else 12

    def pages(self) -> list[_Page]:
        """The pages in the order of the file; at least one."""
        pages: list[_Page] = []
        seen: set[int] = set()
        place = self._number(self._places, self._first)
        while place and place not in seen and len(pages) < _MAX_PAGES:
            seen.add(place)
            try:
                page, place = self._page(place)
            except ImageError:
                if not pages:
                    raise
                break  # a later page is cut; the picture is there
            pages.append(page)
        if not pages:
            raise self._damaged("has no directory")
        return pages

    def check_extent(self, page: _Page) -> None:
        """Refuse a page of which strips or tiles are missing, or reach beyond the file's end; or a palette of 8 bits.

        What is missing would be black, a directory that is written at the end be taken for pixels, and such a palette
        be black, too.
        """
        (width, height), samples, bits = page.size, page.first(_SAMPLES, 1), page.bits[0]
        planes, samples = (samples, 1) if page.first(_PLANES, 1) == 2 else (1, samples)
        tiled = _TILE_WIDTH in page.entries
        rows = page.first(_TILE_HEIGHT, 0) if tiled else min(page.first(_ROWS, height), height)
        across = page.first(_TILE_WIDTH, 0) if tiled else width
        if not rows or not across:
            raise self._damaged("has strips or tiles of no size")
        down = -(-height // rows)
        count = down * -(-width // across) * planes
        places, lengths = (self._all(page.entries.get(tag)) for tag in (_TILES if tiled else _STRIPS))
        if len(places) < count:
            raise self._damaged("lacks some of its strips or tiles")
        end = len(self._data)
        if page.first(_COMPRESSION, 1) == 1 and page.first(_PHOTOMETRIC, -1) != _YCBCR:
            row = -(-across * bits * samples // 8)
            lengths = np.full(count, min(rows * row, end + 1), np.uint64)
            if not tiled:
                lengths[down - 1 :: down] = min((height - (down - 1) * rows) * row, end + 1)
        places, lengths = places[:count], lengths[:count] if len(lengths) >= count else np.zeros(count, np.uint64)
        if ((places > end) | (lengths > end) | (places + lengths > end)).any():
            raise self._damaged("ends before its pixels do")
        if not places.all():
            raise _unsupported("of which strips or tiles are left out")
        if page.first(_PHOTOMETRIC, -1) == _PALETTE and self._all(page.entries.get(_COLORS)).max(initial=0) < 256:
            raise _unsupported("with a palette of 8-bit colours, where 16 bits belong")

    def with_directory(self, page: _Page, photometric: int | None) -> bytes:
        """The file with one directory at its end, of the page's tags that make pixels."""
        entries = {tag: page.entries[tag] for tag in sorted(_PIXEL_TAGS & page.entries.keys())}
        if photometric is not None:
            entries[_PHOTOMETRIC] = self._short(_PHOTOMETRIC, photometric)
        place = len(self._data) + len(self._data) % 2
        if not self._big and place >= 2**32:
            raise self._damaged("is too long")
        count = struct.pack(self._order + ("Q" if self._big else "H"), len(entries))
        pointer = struct.pack(self._order + self._places, place)
        end = self._first + len(pointer)
        parts = [self._data[: self._first], pointer, self._data[end:], b"\0" * (len(self._data) % 2)]
        return b"".join([*parts, count, *entries.values(), bytes(len(pointer))])

    def _short(self, tag: int, value: int) -> bytes:
        count = struct.pack(self._order + "HH" + self._places, tag, 3, 1)
        return (count + struct.pack(self._order + "H", value)).ljust(self._entry, b"\0")

    def _page(self, place: int) -> tuple[_Page, int]:
        count_format = "Q" if self._big else "H"
        count = self._number(count_format, place)
        start = place + struct.calcsize(self._order + count_format)
        if not 0 < count <= _MAX_TAGS:
            raise self._damaged("has a directory that is no such")
        entries: dict[int, bytes] = {}
        numbers: dict[int, tuple[int, ...]] = {}
        for index in range(count):
            entry = self._data[start + index * self._entry : start + (index + 1) * self._entry]
            if len(entry) < self._entry:
                raise self._damaged("ends in a directory")
            tag = int(struct.unpack_from(self._order + "H", entry)[0])
            if tag not in entries:
                entries[tag], found = entry, self._numbers(entry)
                if found:
                    numbers[tag] = found
        after = start + count * self._entry
        has_next = after + struct.calcsize(self._order + self._places) <= len(self._data)
        return _Page(entries, numbers), self._number(self._places, after) if has_next else 0

    def _numbers(self, entry: bytes) -> tuple[int, ...]:
        """The first few of an entry's whole numbers; none of what is no number or lies outside."""
        _, kind, count = struct.unpack_from(self._order + "HH" + self._places, entry)
        if kind not in _NUMBERS or not count:
            return ()
        found = entry[12 if self._big else 8 :]
        if count * _SIZES[kind] > len(found):  # they stand elsewhere
            place = struct.unpack(self._order + self._places, found)[0]
            found = self._data[place : place + _FIRST * _SIZES[kind]]
        form = struct.Struct(f"{self._order}{min(count, _FIRST)}{_NUMBERS[kind]}")
        return form.unpack_from(found) if len(found) >= form.size else ()

    def _all(self, entry: bytes | None) -> np.ndarray:
        """All of an entry's whole numbers that lie in the file."""
        kind, count = (0, 0) if entry is None else struct.unpack_from(self._order + "H" + self._places, entry, 2)
        if entry is None or kind not in _NUMBERS:
            return np.empty(0, np.uint64)
        found = entry[12 if self._big else 8 :]
        if count * _SIZES[kind] > len(found):
            place = struct.unpack(self._order + self._places, found)[0]
            found = self._data[place : place + count * _SIZES[kind]]
        count = min(count, len(found) // _SIZES[kind])
        return np.frombuffer(found, f"{self._order}u{_SIZES[kind]}", count).astype(np.uint64)

    def _number(self, form: str, place: int) -> int:
        try:
            return int(struct.unpack_from(self._order + form, self._data, place)[0])
        except struct.error:
            raise self._damaged("ends before its directory") from None

    def _damaged(self, how: str) -> ImageError:
        return ImageError("unreadable-image", f"a TIFF file of {len(self._data)} bytes that {how}", "replace the file")


def _unsupported(found: str) -> ImageError:
    return ImageError("unsupported-image", f"a TIFF file {found}", _FIX)
