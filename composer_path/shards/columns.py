"""What one sample of a shard holds: its columns, and how image files are packed into one value."""

from __future__ import annotations

import struct
from collections.abc import Sequence

FORMAT_VERSION = 1
COLUMNS = {"id": "str", "conversation": "json", "images": "bytes", "metadata": "json"}
COLUMN_MEANINGS = {
    "id": "the record's id, or 'record-' and its position; a keyed hash unless ids were kept",
    "conversation": "turns as [role, text] with one <image> tag for each image, and the system message or null",
    "images": "uint32 count, uint32 size of each (little endian), then the files one after the other",
    "metadata": "those given of source, organ, stain, magnification, mpp, meta, patient, slide; and images: their "
    "names, as keyed hashes unless ids were kept",
}


def pack_images(images: Sequence[bytes]) -> bytes:
    """Join image files into one value: count, sizes (little-endian uint32 each), then the files."""
    return b"".join(packed_parts(images))


def packed_parts(images: Sequence[bytes]) -> list[bytes]:
    """Return what `pack_images` joins, for writers that need no copy of it."""
    return [struct.pack(f"<{len(images) + 1}I", len(images), *map(len, images)), *images]


def unpack_images(data: bytes) -> list[bytes]:
    """Split what `pack_images` joined; a `ValueError` says that the value is damaged or of another format."""
    return [bytes(image) for image in image_views(data)]


def image_views(data: bytes) -> list[memoryview]:
    """As `unpack_images`, without a copy: a finished square or features are large, and are copied once anyway."""
    count = struct.unpack_from("<I", data)[0] if len(data) >= 4 else 0
    start = 4 + 4 * count
    sizes = struct.unpack_from(f"<{count}I", data, 4) if start <= len(data) else ()
    if len(data) < 4 or start + sum(sizes) != len(data):
        raise ValueError(
            f"packed images must be a count, sizes and files, found {len(data)} bytes for {count} images; "
            "the shard is damaged or not of this format: convert the data again"
        )
    images, whole = [], memoryview(data)
    for size in sizes:
        images.append(whole[start : start + size])
        start += size
    return images
