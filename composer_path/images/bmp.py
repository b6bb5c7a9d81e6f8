"""What a BMP file's header says, read before its decoder sees it (Microsoft's BITMAPINFOHEADER)."""

from __future__ import annotations

import struct

from composer_path.records.rules import ImageError

_COMPRESSIONS = {4: "JPEG", 5: "PNG", 11: "CMYK", 12: "CMYK", 13: "CMYK"}
_READ = (0, 1, 2, 3, 6)  # none, two run lengths, bit fields
_BITS = (1, 4, 8, 16, 24, 32)


def check_bmp(data: bytes) -> None:
    """Refuse what isn't read.

    Raises:
        ImageError: `unsupported-image`, or `unreadable-image` where the header is cut.
    """
    length = int.from_bytes(data[14:18], "little")
    if len(data) < 14 + max(length, 12) or length < 12:
        found = f"a BMP file of {len(data)} bytes that ends in its header"
        raise ImageError("unreadable-image", found, "replace the file")
    if length < 40:
        bits, compression = int.from_bytes(data[24:26], "little"), 0
    else:
        bits, compression = struct.unpack_from("<HI", data, 28)
    if compression not in _READ or bits not in _BITS:
        kind = _COMPRESSIONS.get(compression, f"compression {compression}")
        found = f"a BMP file of {bits} bits" if compression in _READ else f"a BMP file that holds {kind}"
        raise ImageError("unsupported-image", found, "save it as PNG")
