"""Before the first sample: one run a cache, nothing left of a killed one, an index as new as the remote's."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from streaming.base.shared.prefix import _unpack_locals

from composer_path.shards.mds import leads_out
from composer_path.storage.errors import Fault
from composer_path.stream.error import StreamError
from composer_path.stream.guarded_stream import GuardedStream

log = logging.getLogger(__name__)

INDEX = "index.json"
# At the start nothing is lost yet, and a mistyped address should be told soon.
START_SECONDS = 20.0
_LOCK_SECONDS = 5.0  # a killed run's workers notice within 2 s
_BROKEN = (ValueError, KeyError, TypeError, AttributeError)  # what reading something else than an index raises


def take_cache(folder: Path) -> IO[str]:
    """Take a cache folder for this process and its workers, or raise `StreamError` if another run has it.

    Each would count, and delete, what the other fetched. Closing the lock file frees the folder, as does the kernel
    when these processes are gone. It lies in the machine's temporary folder: machines may share a cache.
    """
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    lock = open(Path(tempfile.gettempdir()) / f"composer_path-{os.getuid()}-{name}.lock", "a+", encoding="utf-8")  # noqa: SIM115
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > end:
                lock.seek(0)
                found = f"another run on this machine reads through this folder (process {lock.read(20) or 'unknown'})"
                fix = "give each loader its own folder as local, or end that run"
                lock.close()
                raise StreamError.of("", "cache-in-use", str(folder), found, fix) from None
        time.sleep(0.1)
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def clear_left_overs(folders: Sequence[Path]) -> None:
    """Remove what a killed run left for folders that are ours: unfinished files, and memory that would refuse them."""
    ours = {str(folder.absolute()) for folder in folders}
    for path in Path("/dev/shm").glob("*_locals"):
        with suppress(OSError, ValueError, IndexError):  # another user's, or not Streaming's
            if ours & set(_unpack_locals(path.read_bytes())[0]):
                for other in path.parent.glob(f"{path.name.removesuffix('locals')}*"):
                    other.unlink(missing_ok=True)
    for folder in folders:
        for part in folder.rglob("*.part"):
            if re.search(r"\.\d+-[0-9a-f]{8}\.part$", part.name):
                part.unlink(missing_ok=True)


def refresh_index(stream: GuardedStream) -> None:
    """Bring the remote's index into the cache, whatever lies there; files that it doesn't name any more go."""
    current, fresh = stream.folder / INDEX, stream.folder / f"{INDEX}.new"
    try:
        stream.bring(INDEX, check_index, fresh, START_SECONDS)
        before, after = {}, _files(fresh)
        with suppress(OSError, *_BROKEN):  # there is none yet
            before = _files(current)
        changed = [name for name, content in before.items() if after.get(name) != content]
        if changed:
            log.warning("%s was converted again: %d old shards leave the cache", stream.where, len(changed))
        for name in changed:
            if not leads_out(name):
                (stream.folder / name).unlink(missing_ok=True)
        os.replace(fresh, current)
    except OSError as error:
        raise stream.error(INDEX, error) from None


def check_index(path: Path) -> None:
    """Raise a `Fault` unless a file is an index whose shards lie below it."""
    try:
        names = list(_files(path))
    except _BROKEN as error:
        # Transient: it may have been cut or changed on its way.
        found = f"{type(error).__name__} while reading it ({path.stat().st_size:,} bytes)"
        raise Fault("index", found, "convert the data again", transient=True) from None
    outside = any(map(leads_out, names))
    if outside or not names:
        found = "found a shard outside of the folder" if outside else "found no shard"
        raise Fault("index", found, "convert the data again")


def _files(index: Path) -> dict[str, object]:
    """The shard files that an index names, and what it says of their contents."""
    shards = json.loads(index.read_bytes())["shards"]
    parts = [shard[key] for shard in shards for key in shard if key.startswith(("raw_", "zip_"))]
    # Without a checksum nothing tells whether two files are the same.
    return {part["basename"]: part.get("hashes") or object() for part in parts if part}
