"""Whether a file on disk is the one that an index speaks of: its size and its checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
from streaming.base.format import FileInfo

from composer_path.storage.errors import Fault

# Of several in an index the cheapest is taken.
_CHEAPEST = ("xxh3_64", "xxh3_128", "xxh128", "xxh64", "xxh32", "blake2b", "sha1", "md5", "sha256")
_AGAIN = "put a good copy there, or convert the data again"


def pick_hash(hashes: Mapping[str, str], wanted: str | None = None) -> tuple[str, str] | None:
    """The checksum to check a file with, and its value; None where the index has none, `Fault` if it lacks `wanted`."""
    if wanted is not None and wanted not in hashes:
        has = ", ".join(sorted(hashes)) or "none"
        fix = "leave validate_hash out: what the index has is always checked"
        raise Fault("no-such-hash", f"validate_hash is {wanted}, the index has {has}", fix)
    name = wanted or next((name for name in (*_CHEAPEST, *sorted(hashes)) if name in hashes), None)
    return None if name is None else (name, hashes[name])


def check_file(path: Path, info: FileInfo, wanted_hash: str | None) -> None:
    """Compare a file with what its index says; raise `Fault` if it is another one, or a damaged one."""
    if (found := path.stat().st_size) != info.bytes:
        raise Fault("size", f"found {found:,} bytes where the index says {info.bytes:,}", _AGAIN, transient=True)
    name, value = pick_hash(info.hashes, wanted_hash) or ("", "")
    if name and (digest := file_hash(path, name)) != value:
        raise Fault("hash", f"found {name} {digest} where the index says {value}", _AGAIN, transient=True)


def file_hash(path: Path, name: str) -> str:
    """A file's checksum in hexadecimal, read in pieces."""
    state: Any = getattr(xxhash, name)() if name in xxhash.algorithms_available else hashlib.new(name)
    piece = memoryview(bytearray(1 << 20))  # stays in the processor's cache
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(piece):
            state.update(piece[:size])
    return state.hexdigest()
