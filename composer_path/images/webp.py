"""A WebP file's chunks: those that make pixels, and its size, before the decoder takes memory for it.

Layout: RFC 9649, 2.3 to 2.7.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from composer_path.records.rules import ImageError

_PIXEL_CHUNKS = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")
_ICC, _EXIF, _XMP, _ANIMATION = 0x20, 0x08, 0x04, 0x02  # of VP8X's flags
_MAX_EXIF = 2**16


def pixel_chunks(data: bytes) -> tuple[bytes, tuple[int, int], bool]:
    """The file without profile and text (a short EXIF stays: it may say how it lies), its size, whether it moves.

    Raises:
        ImageError: `unreadable-image`, it is cut or has no pixels.
    """
    kept: list[bytes] = []
    size, flags = None, 0
    for kind, body in _chunks(data):
        if size is None:
            size = _size(kind, body)
            if size is None:
                raise _damaged(data, "has no size")
            flags = body[0] if kind == b"VP8X" else 0
        if kind in _PIXEL_CHUNKS or (kind == b"EXIF" and len(body) <= _MAX_EXIF):
            kept.append(kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2))
    if size is None:
        raise _damaged(data, "has no pixels")
    if kept[0].startswith(b"VP8X"):
        exif = _EXIF if any(chunk.startswith(b"EXIF") for chunk in kept) else 0
        kept[0] = kept[0][:8] + bytes([flags & ~(_ICC | _XMP | _EXIF) | exif]) + kept[0][9:]
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body, size, bool(flags & _ANIMATION)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position, end = 12, min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while position + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, position)
        if position + 8 + length > len(data):
            if kind in _PIXEL_CHUNKS:
                raise _damaged(data, "ends in a chunk")
            return
        yield kind, data[position + 8 : position + 8 + length]
        position += 8 + length + length % 2


def _size(kind: bytes, body: bytes) -> tuple[int, int] | None:
    if kind == b"VP8X" and len(body) >= 10:
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L" and len(body) >= 5 and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and len(body) >= 10 and body[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _damaged(data: bytes, how: str) -> ImageError:
    return ImageError("unreadable-image", f"a WebP file of {len(data)} bytes that {how}", "replace the file")
