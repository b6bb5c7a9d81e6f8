"""A JPEG's frame header, read before any decoder sees the file: its process, precision, size and components.

libjpeg makes a picture smaller while decoding for the DCT processes with 8 bits only; asked of a lossless file it
writes beyond its memory. Markers and fields: ITU-T T.81, B.2.2; JPEG-LS: T.87.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from composer_path.records.rules import ImageError

# A marker is 0xFF (any number of them) and a byte that is neither 0 nor 0xFF.
MARKER = re.compile(rb"\xff\xff*([^\x00\xff])")  # \xff\xff* is searched twice as fast as \xff+
SOS, EOI = 0xDA, 0xD9
STAND_ALONE = frozenset({0x01, 0xD8, *range(0xD0, 0xD8)})  # TEM, SOI, RSTn: no segment follows
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_DCT_HUFFMAN, _PROGRESSIVE = frozenset({0xC0, 0xC1, 0xC2}), frozenset({0xC2, 0xCA})
_READ = _DCT_HUFFMAN | {0xC3, 0xC9, 0xCA}
_HIERARCHICAL = frozenset({0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF, 0xDE, 0xDF})
_JPEG_LS = 0xF7
_MAX_FACTOR = 4
_MAX_BLOCKS = 10  # of all components in a unit that is coded together (T.81, B.2.3)
_FIX = "save it as an 8-bit baseline JPEG, or as PNG"


@dataclass(frozen=True)
class Frame:
    """What a frame header says."""

    marker: int
    precision: int  # bits
    width: int
    height: int
    num_components: int

    @property
    def scalable(self) -> bool:
        """Whether decoders may make it smaller on the way; such a file is also kept bit for bit."""
        return self.marker in _DCT_HUFFMAN

    @property
    def progressive(self) -> bool:
        """Whether its scans refine one another."""
        return self.marker in _PROGRESSIVE


def frame_of(data: bytes) -> Frame:
    """Find and check the frame header of a JPEG file.

    Raises:
        ImageError: `unsupported-image` for a process that isn't read, `unreadable-image` where there is no frame.
    """
    position = 2
    while match := MARKER.search(data, position):
        marker, position = match[1][0], match.end()
        if marker in (SOS, EOI):
            break
        if marker in STAND_ALONE:
            continue
        length = int.from_bytes(data[position : position + 2])
        if marker in FRAMES or marker in _HIERARCHICAL or marker == _JPEG_LS:
            return read_frame(marker, data[position + 2 : position + length], len(data))
        position += max(length, 2)
    raise damaged("has no frame", len(data))


def read_frame(marker: int, segment: bytes, size: int) -> Frame:
    """Read a frame header's fields, of a file of `size` bytes; raises as `frame_of`."""
    if marker == _JPEG_LS:
        raise _unsupported("a JPEG-LS file")
    if marker in _HIERARCHICAL:
        raise _unsupported("a hierarchical JPEG")
    if len(segment) < 6:
        raise damaged("ends in its frame header", size)
    precision, height, width, num_components = struct.unpack(">BHHB", segment[:6])
    components = segment[6 : 6 + 3 * num_components]
    if len(components) < 3 * num_components or not num_components or not width:
        raise damaged("has a frame header that is no such", size)
    if precision != 8:
        lossless = "lossless " if marker == 0xC3 else ""
        raise _unsupported(f"a {lossless}JPEG of {precision} bits for each sample")
    if marker not in _READ:
        raise _unsupported("an arithmetic-coded lossless JPEG")
    if num_components not in (1, 3, 4):
        raise _unsupported(f"a JPEG of {num_components} components")
    if not height:
        raise _unsupported("a JPEG whose height isn't in its header")
    _check_sampling(components[1::3], size)
    return Frame(marker, precision, width, height, num_components)


def damaged(how: str, size: int) -> ImageError:
    """The error of a damaged file."""
    return ImageError("unreadable-image", f"a JPEG file of {size} bytes that {how}", "replace the file")


def _check_sampling(factors: bytes, size: int) -> None:
    pairs = [(factor >> 4, factor & 15) for factor in factors]
    if any(not 1 <= factor <= _MAX_FACTOR for pair in pairs for factor in pair):
        raise damaged("has impossible sampling factors", size)
    if len(pairs) > 1 and sum(across * down for across, down in pairs) > _MAX_BLOCKS:
        raise damaged("has impossible sampling factors", size)
    for axis in (0, 1):
        most = max(pair[axis] for pair in pairs)
        if any(most % pair[axis] for pair in pairs):
            raise _unsupported("a JPEG with fractional sampling of its colours")


def _unsupported(found: str) -> ImageError:
    return ImageError("unsupported-image", found, _FIX)
