"""Refuses before the first record what would else fail after the last."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from composer_path.conversion.rejections import ConvertError
from composer_path.shards.writer import HASHES
from composer_path.storage.places import Bucket, Folder, StorageError, is_remote, open_place, shown

_UNITS = {"": 1, "b": 1, "kb": 2**10, "mb": 2**20, "gb": 2**30}


def parse_size(size_limit: int | str) -> int:
    """Return a shard size in bytes; "64mb" is 64 * 1024 * 1024, as in streaming.

    Raises:
        ConvertError: it is no size, or larger than a shard can be.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(size_limit).strip().lower())
    unit = _UNITS.get(match[2]) if match else None
    size = int(float(match[1]) * unit) if match and unit is not None else 0
    if not 0 < size < 2**32:
        raise ConvertError(f"--size-limit: must be a size below 4 GB such as 64mb, found {size_limit!r}")
    return size


def parse_part(part: str | None) -> tuple[int, int]:
    """Return number and count of a part "2/8"; (1, 1) for None.

    Raises:
        ConvertError: it is no such pair.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", part or "1/1")
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConvertError(f"--part: must be i/N with i from 1 to N, such as 2/8, found {part!r}")
    return int(match[1]), int(match[2])


def refuse_wrong_options(
    *,
    on_error: str,
    ids: str,
    hashes: Sequence[str],
    check: str,
    resized: dict[str, Any] | None,
    workers: int,
    engine: str,
    partition_size: int | None,
    resume: bool,
    overwrite: bool,
    parts: int,
) -> None:
    """Check ``convert``'s options.

    Raises:
        ConvertError: one is wrong, or two don't go together.
    """
    choices = {
        "--on-error": (on_error, ("fail", "skip")),
        "--ids": (ids, ("hash", "keep")),
        "--check": (check, ("full", "header")),
        "--engine": (engine, ("local", "spark")),
    }
    for option, (value, known) in choices.items():
        if value not in known:
            raise ConvertError(f"{option}: must be {known[0]!r} or {known[1]!r}, found {value!r}")
    unknown = [name for name in hashes if name not in HASHES]
    if unknown:
        raise ConvertError(f"hashes: must be checksums such as xxh64 or sha256, found {unknown}")
    for option, number in (("--workers", workers), ("--partition-size", partition_size)):
        if number is not None and number < 1:
            raise ConvertError(f"{option}: must be 1 or more, found {number}")
    if resized is not None and not 1 <= resized["image_size"] <= 65535:
        raise ConvertError(f"--resize: must be 1 to 65535 pixels, found {resized['image_size']}")
    if resume and overwrite:
        raise ConvertError("--resume and --overwrite: must not both be given; one keeps what the other deletes")
    if overwrite and parts > 1:
        raise ConvertError("--overwrite: must not be given for a part; it would delete the others: empty the place")


def check_places(data: str, images: str, out: str, used_is_fine: bool) -> Folder | Bucket:
    """Check that there is something to read and a place to write, and return the place.

    Raises:
        ConvertError: there isn't.
    """
    if is_remote(data):
        folder, _, name = data.rpartition("/")
        try:
            Bucket(folder).size(name)
        except (OSError, ValueError) as error:
            found = "no such object" if isinstance(error, FileNotFoundError) else error
            raise ConvertError(f"--data {shown(data)}: must be a JSON or JSONL file, found {found}") from None
    elif not Path(data).is_file():
        found = "a folder" if Path(data).is_dir() else "no such file"
        raise ConvertError(f"--data {data}: must be a JSON or JSONL file, found {found}")
    if not is_remote(images) and not Path(images).is_dir():
        raise ConvertError(f"--images {images}: must be the folder of the images, found no such folder")
    try:
        place = open_place(out)
        if isinstance(place, Folder) and place.path.exists() and not place.path.is_dir():
            raise ConvertError(f"--out {out}: must be empty, found a file; choose another place")
        used = bool(place.files())
    except StorageError as error:
        raise ConvertError(f"--out {shown(out)}: must be a writable place, found {error}") from None
    if used and not used_is_fine:
        fix = "empty it or choose another one, go on with --resume, or replace what is there with --overwrite"
        raise ConvertError(f"--out {place}: must be empty, found files; {fix}")
    return place
