"""A slide of uncompressed DICOM files, one for each level and one for the label; written here byte by byte."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

_TILE = 32
_ROOT = "1.2.826.0.1.3680043.10.999."  # UIDs that stand for nothing
_SLIDE_CLASS = "1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy Image
_EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
_MICROMETRES = 0.5  # of a pixel of level 0


def write_tiny_dicom(folder: Path, levels: list[np.ndarray]) -> Path:
    """Write `level0.dcm` and so on, and a black `label.dcm`; all belong together and hold a patient's name."""
    folder.mkdir(exist_ok=True)
    for number, pixels in enumerate(levels):
        kind = "ORIGINAL\\PRIMARY\\VOLUME\\NONE" if number == 0 else "DERIVED\\PRIMARY\\VOLUME\\RESAMPLED"
        spacing = _MICROMETRES / 1000 * levels[0].shape[1] / pixels.shape[1]
        (folder / f"level{number}.dcm").write_bytes(_file(pixels, kind, spacing, number + 1))
    label = np.zeros((_TILE, _TILE, 3), np.uint8)
    (folder / "label.dcm").write_bytes(_file(label, "ORIGINAL\\PRIMARY\\LABEL\\NONE", 0.01, 99))
    return folder


def _file(pixels: np.ndarray, kind: str, spacing: float, instance: int) -> bytes:
    height, width, _ = pixels.shape
    tiles = []
    for top in range(0, height, _TILE):
        for left in range(0, width, _TILE):
            tile = np.zeros((_TILE, _TILE, 3), np.uint8)
            part = pixels[top : top + _TILE, left : left + _TILE]
            tile[: part.shape[0], : part.shape[1]] = part
            tiles.append(tile.tobytes())
    uid = f"{_ROOT}1.{instance}"
    measures = _element(0x0018, 0x0050, "DS", "0.001") + _element(0x0028, 0x0030, "DS", f"{spacing}\\{spacing}")
    groups = _element(0x0028, 0x9110, "SQ", _item(measures))
    body = [
        _element(0x0008, 0x0008, "CS", kind),
        _element(0x0008, 0x0016, "UI", _SLIDE_CLASS),
        _element(0x0008, 0x0018, "UI", uid),
        _element(0x0008, 0x0060, "CS", "SM"),
        _element(0x0010, 0x0010, "PN", "Miller^Jane"),
        _element(0x0020, 0x000D, "UI", f"{_ROOT}2"),
        _element(0x0020, 0x000E, "UI", f"{_ROOT}3"),
        _element(0x0020, 0x0052, "UI", f"{_ROOT}4"),
        _element(0x0020, 0x9311, "CS", "TILED_FULL"),
        _element(0x0028, 0x0002, "US", 3),
        _element(0x0028, 0x0004, "CS", "RGB"),
        _element(0x0028, 0x0006, "US", 0),
        _element(0x0028, 0x0008, "IS", str(len(tiles))),
        _element(0x0028, 0x0010, "US", _TILE),
        _element(0x0028, 0x0011, "US", _TILE),
        *(_element(0x0028, 0x0100 + n, "US", value) for n, value in enumerate((8, 8, 7, 0))),
        _element(0x0048, 0x0006, "UL", width),
        _element(0x0048, 0x0007, "UL", height),
        _element(0x0048, 0x0105, "SQ", _item(_element(0x0048, 0x0106, "SH", "1"))),
        _element(0x0048, 0x0302, "UL", 1),
        _element(0x0048, 0x0303, "UL", 1),
        _element(0x5200, 0x9229, "SQ", _item(groups)),
        _element(0x7FE0, 0x0010, "OB", b"".join(tiles)),
    ]
    meta = _element(0x0002, 0x0001, "OB", b"\0\1") + _element(0x0002, 0x0002, "UI", _SLIDE_CLASS)
    meta += _element(0x0002, 0x0003, "UI", uid) + _element(0x0002, 0x0010, "UI", _EXPLICIT_LITTLE_ENDIAN)
    return b"".join([b"\0" * 128, b"DICM", _element(0x0002, 0x0000, "UL", len(meta)), meta, *body])


def _element(group: int, element: int, kind: str, value: Any) -> bytes:
    if isinstance(value, int):
        value = struct.pack("<H" if kind == "US" else "<I", value)
    elif isinstance(value, str):
        value = value.encode()
        value += (b"\0" if kind == "UI" else b" ") * (len(value) % 2)
    length = struct.pack("<2xI" if kind in ("OB", "SQ") else "<H", len(value))
    return struct.pack("<HH", group, element) + kind.encode() + length + value


def _item(content: bytes) -> bytes:
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content
