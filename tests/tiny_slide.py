"""A pyramidal, tiled TIFF of a few kilobytes that OpenSlide takes for a slide; written here byte by byte."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

_TILE = 32  # pixels a side; with 16 (768 bytes a tile) libtiff reads 1,024 bytes and refuses them
_SHORT, _LONG, _RATIONAL = 3, 4, 5


def tiny_slide_levels(width: int = 80, height: int = 48, num_levels: int = 2) -> list[np.ndarray]:
    """Pixels of each level, no two alike in level 0; every level is half as wide as the one before."""
    y, x = np.mgrid[0:height, 0:width]
    levels = [np.stack([x * 3, y * 5, (x + y) % 7 * 30], axis=-1).astype(np.uint8)]
    while len(levels) < num_levels:
        levels.append(levels[-1][::2, ::2].copy())
    return levels


def write_tiny_slide(path: Path, levels: list[np.ndarray], pixels_per_cm: int | None = 20_000) -> Path:
    """Write the levels; 20,000 pixels a centimetre are 0.5 micrometres a pixel."""
    body, directories = bytearray(b"\0" * 8), []
    for number, pixels in enumerate(levels):
        height, width, _ = pixels.shape
        offsets = []
        for top in range(0, height, _TILE):
            for left in range(0, width, _TILE):
                tile = np.zeros((_TILE, _TILE, 3), np.uint8)
                part = pixels[top : top + _TILE, left : left + _TILE]
                tile[: part.shape[0], : part.shape[1]] = part
                offsets.append(len(body))
                body += tile.tobytes()
        count = len(offsets)
        rational = len(body)
        body += struct.pack("<2I", pixels_per_cm or 1, 1)
        tables = len(body)
        body += struct.pack(f"<{2 * count}I", *offsets, *[_TILE * _TILE * 3] * count)
        bits = len(body)
        body += struct.pack("<4H", 8, 8, 8, 0)
        entries = [(254, _LONG, 1, int(number > 0)), (256, _LONG, 1, width), (257, _LONG, 1, height)]
        entries += [(258, _SHORT, 3, bits), (259, _SHORT, 1, 1), (262, _SHORT, 1, 2), (277, _SHORT, 1, 3)]
        if pixels_per_cm is not None:
            entries += [(282, _RATIONAL, 1, rational), (283, _RATIONAL, 1, rational)]
        entries += [(284, _SHORT, 1, 1), (296, _SHORT, 1, 3), (322, _SHORT, 1, _TILE), (323, _SHORT, 1, _TILE)]
        entries += [(324, _LONG, count, tables if count > 1 else offsets[0])]
        entries += [(325, _LONG, count, tables + 4 * count if count > 1 else _TILE * _TILE * 3)]
        directories.append((len(body), entries))
        body += struct.pack("<H", len(entries))
        body += b"".join(struct.pack("<HHII", *entry) for entry in entries) + b"\0" * 4
    body[:8] = struct.pack("<2sHI", b"II", 42, directories[0][0])
    for (place, entries), following in zip(directories, [*directories[1:], (0, [])], strict=True):
        struct.pack_into("<I", body, place + 2 + 12 * len(entries), following[0])
    path.write_bytes(body)
    return path
