"""A PNG file's chunks: those that make pixels, checked, and nothing else.

Profiles and text that are long or wrong say nothing of the pixels, but end a decoder that reads them: they are taken
out first. Chunks, their order and checksums: W3C, PNG (Third Edition), 5 and 11.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from composer_path.records.rules import ImageError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
# Where an orientation may stand; what is longer is no orientation.
_TURNING_TEXTS = (b"Raw profile type exif\0", b"Raw profile type APP1\0", b"XML:com.adobe.xmp\0")
_MAX_TURNING, _MAX_TEXT = 2**18, 2**20
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by colour type
_END = struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))


def pixel_chunks(data: bytes, turning: bool = False) -> bytes:
    """The file with the chunks that make pixels, bit for bit; with `turning` also those that may say how it lies.

    Raises:
        ImageError: `unreadable-image` where one is missing, cut or has a wrong checksum; `unsupported-image`.
    """
    kept = [SIGNATURE]
    seen: set[bytes] = set()
    for kind, start, end in _chunks(data):
        body = memoryview(data)[start + 8 : end - 4]
        if not seen and kind != b"IHDR":
            raise _unsupported("an Apple CgBI PNG") if kind == b"CgBI" else _damaged(data, "has no header")
        if kind in _PIXEL_CHUNKS:
            if zlib.crc32(memoryview(data)[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
                raise _damaged(data, "has a wrong checksum in its pixels")
            if kind == b"IHDR":
                _check_header(bytes(body), kind in seen, data)
            kept.append(data[start:end])
        elif not kind[0] & 32 and kind.isalpha():  # a capital: a decoder that doesn't know it can't show the picture
            raise _unsupported("a PNG with a critical chunk of no known kind")
        elif turning and _may_turn(kind, body, data[start:end]):
            kept.append(data[start:end])
        seen.add(kind)
    if b"IDAT" not in seen:
        raise _damaged(data, "has no pixels")
    if kept[-1] != _END:
        kept.append(_END)
    return b"".join(kept)


def has_end(data: bytes) -> bool:
    """Whether the last chunk is there; a decoder does without it if all pixels are."""
    return any(kind == b"IEND" for kind, _, _ in _chunks(data))


def is_animated(data: bytes) -> bool:
    """Whether it has further frames."""
    return any(kind == b"acTL" for kind, _, _ in _chunks(data))


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, first byte and end of each chunk; what is cut isn't given."""
    position = len(SIGNATURE)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            if kind in _PIXEL_CHUNKS or position == len(SIGNATURE):
                raise _damaged(data, "ends in a chunk")
            return
        yield kind, position, end
        if kind == b"IEND":
            return
        position = end


def _check_header(body: bytes, again: bool, data: bytes) -> None:
    if again or len(body) != 13:
        raise _damaged(data, "has a header that is no such")
    _, _, depth, color, compression, filtering, interlace = struct.unpack(">IIBBBBB", body)
    if depth not in _DEPTHS.get(color, ()) or compression or filtering or interlace > 1:
        raise _damaged(data, "has a header that is no such")


def _may_turn(kind: bytes, body: memoryview, chunk: bytes) -> bool:
    """Whether a whole and short chunk may hold an orientation."""
    if len(body) > _MAX_TURNING or zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:]):
        return False
    if kind == b"eXIf":
        return True
    text = bytes(body)
    if not text.startswith(_TURNING_TEXTS) or kind not in (b"tEXt", b"zTXt", b"iTXt"):
        return False
    after = text.partition(b"\0")[2]
    if kind == b"zTXt":
        return _unpacks(after[:1], after[1:])
    if kind == b"iTXt" and after[:1] == b"\1":
        return _unpacks(after[1:2], after[2:].split(b"\0", 2)[-1])
    return True


def _unpacks(method: bytes, packed: bytes) -> bool:
    try:
        unpacker = zlib.decompressobj()
        unpacker.decompress(packed, _MAX_TEXT)
    except zlib.error:
        return False
    return method == b"\0" and unpacker.eof


def _damaged(data: bytes, how: str) -> ImageError:
    return ImageError("unreadable-image", f"a PNG file of {len(data)} bytes that {how}", "replace the file")


def _unsupported(found: str) -> ImageError:
    return ImageError("unsupported-image", found, "save it as an ordinary PNG")
