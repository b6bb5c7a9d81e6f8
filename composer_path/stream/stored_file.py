"""Whether a file on disk is the one that an index speaks of: its size and its checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from composer_path.storage.errors import Fault

# Of several in an index the cheapest is taken.
_CHEAPEST = ("xxh3_64", "xxh3_128", "xxh128", "xxh64", "xxh32", "blake2b", "sha1", "md5", "sha256")
_AGAIN = "put a good copy there, or convert the data again"


def pick_hash(hashes: Mapping[str, str], wanted: str | None = None) -> tuple[str, str] | None:
    """The checksum to check a file with, and its value; None where the index has none.

    Args:
        hashes: Of the file, from its index.
        wanted: Must be this one, if given.

    Raises:
        Fault: The index lacks it.
    """
    if wanted is not None and wanted not in hashes:
        has = ", ".join(sorted(hashes)) or "none"
        fix = "leave validate_hash out: what the index has is always checked"
        raise Fault("no-such-hash", f"validate_hash is {wanted}, the index has {has}", fix)
    names = [wanted] if wanted is not None else [name for name in (*_CHEAPEST, *sorted(hashes)) if name in hashes]
    return (names[0], hashes[names[0]]) if names else None


def check_file(path: Path, size: int, expected: tuple[str, str] | None) -> None:
    """Compare a file with its index.

    Raises:
        Fault: It is another file, or a damaged one.
    """
    found = path.stat().st_size
    if found != size:
        raise Fault("size", f"found {found:,} bytes where the index says {size:,}", _AGAIN, transient=True)
    if expected is not None:
        name, value = expected
        digest = file_hash(path, name)
        if digest != value:
            raise Fault("hash", f"found {name} {digest} where the index says {value}", _AGAIN, transient=True)


def file_hash(path: Path, name: str) -> str:
    """A file's checksum in hexadecimal, read in pieces."""
    state: Any = getattr(xxhash, name)() if name in xxhash.algorithms_available else hashlib.new(name)
    with open(path, "rb") as file:
        while data := file.read(1 << 22):
            state.update(data)
    return state.hexdigest()
