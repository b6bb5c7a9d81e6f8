"""What a JPEG 2000 file says of itself, read before its decoder sees it.

Boxes and the SIZ marker: ITU-T T.800, A.5.1 and I.4.
"""

from __future__ import annotations

import struct

from PIL import __version__ as pillow_version

from composer_path.records.rules import ImageError

STARTS = (b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")
_SIZ = struct.Struct(">HHIIIIIIIIH")  # length, capabilities, x, y, x0, y0, tile x, y, tile x0, y0, components
_FIX = "save it as PNG or TIFF"


def size_of(data: bytes) -> tuple[int, int, int]:
    """Width, height and bits of a file whose kind is read.

    Raises:
        ImageError: `unsupported-image`, or `unreadable-image` without a header.
    """
    start = 0 if data.startswith(STARTS[0]) else _codestream(data)
    if data[start : start + 4] != STARTS[0] or len(data) < start + 4 + _SIZ.size:
        raise _damaged(data, "has no codestream")
    _, _, right, bottom, left, top, tile_width, tile_height, tile_left, tile_top, count = _SIZ.unpack_from(
        data, start + 4
    )
    components = data[start + 4 + _SIZ.size :][: 3 * count]
    width, height = right - left, bottom - top
    if len(components) < 3 * count or not count or width < 1 or height < 1 or not tile_width or not tile_height:
        raise _damaged(data, "has a header that is no such")
    if any(depth & 0x80 for depth in components[::3]):
        raise _unsupported("a JPEG 2000 file with signed samples")
    bits = 1 + max(components[::3])
    if bits > 16 or count > 4:
        raise _unsupported(f"a JPEG 2000 file of {count} components of {bits} bits")
    if (tile_left + tile_width < right or tile_top + tile_height < bottom) and not tiles_are_safe(pillow_version):
        raise _unsupported(f"a JPEG 2000 file in tiles, which Pillow {pillow_version} may not survive")
    return width, height, bits


def tiles_are_safe(version: str) -> bool:
    """Whether this Pillow has the mend of CVE-2026-59204 (a tiled file ends the process): 12.3.0 has."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) >= (12, 3)


def _codestream(data: bytes) -> int:
    position = 0
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        header = 8
        if length == 1 and position + 16 <= len(data):
            length, header = struct.unpack_from(">Q", data, position + 8)[0], 16
        if kind == b"jp2c":
            return position + header
        if length < header:
            break
        position += length
    raise _damaged(data, "has no codestream")


def _damaged(data: bytes, how: str) -> ImageError:
    return ImageError("unreadable-image", f"a JPEG 2000 file of {len(data)} bytes that {how}", "replace the file")


def _unsupported(found: str) -> ImageError:
    return ImageError("unsupported-image", found, _FIX)
