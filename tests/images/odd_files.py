"""Image files of many kinds, made byte by byte where Pillow writes no such."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image


def tissue(width: int = 96, height: int = 64) -> Image.Image:
    """A smooth picture of noise in few colours, always the same."""
    noise = np.random.default_rng(1).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes, wrong: bool = False) -> bytes:
    """A PNG chunk, with a wrong checksum if that is asked for."""
    checksum = zlib.crc32(kind + body) ^ (1 if wrong else 0)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def with_chunks(png: bytes, *chunks: bytes) -> bytes:
    """Chunks behind the header."""
    return png[:33] + b"".join(chunks) + png[33:]


def gray16_png(levels: np.ndarray) -> bytes:
    return encode(Image.fromarray(levels.astype(np.uint16)), "PNG")


def tiff(pages: list[Mapping[str, Any]], order: str = "<", big: bool = False) -> bytes:
    """An uncompressed TIFF of one strip a page; `tags` of a page add to or change those that `pixels` implies."""
    places, entry_place = ("Q", 8) if big else ("I", 4)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42)
    out = bytearray(head + (struct.pack(order + "HHQ", 8, 0, 0) if big else struct.pack(order + "I", 0)))
    pointer = 8 if big else 4
    for page in pages:
        pixels = np.asarray(page["pixels"])
        height, width = pixels.shape[:2]
        samples = 1 if pixels.ndim == 2 else pixels.shape[2]
        data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
        strip = len(out)
        out += data + b"\0" * (len(data) % 2)
        tags: dict[int, Any] = {256: width, 257: height, 258: [pixels.itemsize * 8] * samples, 259: 1}
        tags |= {262: 2 if samples > 2 else 1, 273: strip, 277: samples, 278: height, 279: len(data)}
        tags |= dict(page.get("tags", {}))
        entries = []
        for tag, value in sorted(tags.items()):
            values = value if isinstance(value, list) else [value]
            body = struct.pack(f"{order}{len(values)}I", *values)
            kind = 4
            if all(one < 65536 for one in values):
                kind, body = 3, struct.pack(f"{order}{len(values)}H", *values)
            if len(body) > entry_place:
                place = len(out)
                out += body + b"\0" * (len(body) % 2)
                body = struct.pack(order + places, place)
            entries.append(struct.pack(order + "HH" + places, tag, kind, len(values)) + body.ljust(entry_place, b"\0"))
        directory = len(out)
        out += struct.pack(order + ("Q" if big else "H"), len(entries)) + b"".join(entries) + bytes(entry_place)
        struct.pack_into(order + places, out, pointer, directory)
        pointer = len(out) - entry_place
    return bytes(out)


def jpeg_with_frame(change: Mapping[int, int], marker: int | None = None, mode: str = "RGB") -> bytes:
    """A baseline JPEG of which bytes of the frame header are changed, counted from the precision."""
    data = bytearray(encode(tissue().convert(mode), "JPEG", subsampling=0 if mode == "RGB" else -1))
    place = data.index(b"\xff\xc0")
    if marker is not None:
        data[place + 1] = marker
    for offset, value in change.items():
        data[place + 4 + offset] = value
    return bytes(data)
