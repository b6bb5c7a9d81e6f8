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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from composer_path.storage.errors import Fault
from composer_path.storage.transfer import cache_fault
from composer_path.stream.error import StreamError
from composer_path.stream.guarded_stream import GuardedStream

log = logging.getLogger(__name__)

INDEX = "index.json"
# At the start nothing is lost yet, and a mistyped address should be told soon.
START_SECONDS = 20.0
_LOCK_SECONDS = 5.0  # a killed run's workers notice within 2 s
_SHARED_MEMORY = Path("/dev/shm")


def take_cache(folder: Path) -> IO[str]:
    """Take a cache folder for this process and its workers; the kernel frees it when they are gone, however they end.

    The lock file lies in the machine's temporary folder: machines may share a cache on a network disk.

    Returns:
        The open lock file; closing it frees the folder.

    Raises:
        StreamError: Another run has it. Each would count, and delete, what the other fetched.
    """
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    lock = open(Path(tempfile.gettempdir()) / f"composer_path-{os.getuid()}-{name}.lock", "a+", encoding="utf-8")  # noqa: SIM115
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < end:
                time.sleep(0.1)
                continue
            lock.seek(0)
            owner = lock.read(20).strip()
            lock.close()
            found = f"another run on this machine reads through this folder (process {owner or 'unknown'})"
            fix = "give each loader its own folder as local, or end that run"
            raise StreamError.of("", "cache-in-use", str(folder), found, fix) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        return lock


def clear_left_overs(folders: Sequence[Path]) -> None:
    """Remove what a killed run left for these folders: shared memory, which would refuse them, and unfinished files.

    Only to be called with the folders' locks, as nobody else can use them then.
    """
    ours = {str(folder.absolute()) for folder in folders}
    for path in _SHARED_MEMORY.glob("*_locals"):
        try:
            data = path.read_bytes()
            names = data[4 : int.from_bytes(data[:4], "little")].decode().split("\0")[:-1]
            if ours & set(names):
                for other in _SHARED_MEMORY.glob(f"{path.name.removesuffix('locals')}*"):
                    other.unlink(missing_ok=True)
        except (OSError, UnicodeDecodeError):  # another user's, or not Streaming's
            continue
    for folder in folders:
        for part in folder.rglob("*.part"):
            if re.search(r"\.\d+-[0-9a-f]{8}\.part$", part.name):
                part.unlink(missing_ok=True)


def refresh_index(stream: GuardedStream) -> None:
    """Bring the remote's index into the cache, whatever lies there; files that it doesn't name any more go.

    Raises:
        StreamError: It can't be had, or isn't an index.
    """
    current = stream.folder / INDEX
    fresh = stream.folder / f"{INDEX}.new"
    try:
        stream.folder.mkdir(parents=True, exist_ok=True)
        probe = stream.folder / f".{os.getpid()}.probe"
        probe.write_bytes(b"")
        probe.unlink()
        stream.bring(INDEX, check_index, fresh, START_SECONDS)
        before, after = files_of(current) if current.exists() else {}, files_of(fresh)
        changed = [name for name, content in before.items() if after.get(name) != content]
        if changed:
            log.warning("%s was converted again: %d old shards leave the cache", stream.where, len(changed))
        for name in changed:
            (stream.folder / name).unlink(missing_ok=True)
        os.replace(fresh, current)
    except OSError as error:
        raise stream.error(INDEX, cache_fault(error)) from None


def check_index(path: Path) -> None:
    """Whether a file is an index whose shards lie below it.

    Raises:
        Fault: It isn't.
    """
    try:
        names = list(_files(path))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # Transient: it may have been cut or changed on its way.
        found = f"{type(error).__name__} while reading it ({path.stat().st_size:,} bytes)"
        raise Fault("index", found, "convert the data again", transient=True) from None
    outside = [name for name in names if name.startswith("/") or ".." in Path(name).parts]
    if outside or not names:
        found = "a shard outside of the folder" if outside else "no shard"
        raise Fault("index", f"found {found}", "convert the data again")


def files_of(index: Path) -> dict[str, object]:
    """The shard files that an index names, and what it says of their contents; none if it can't be read."""
    try:
        return _files(index)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _files(index: Path) -> dict[str, object]:
    shards = json.loads(index.read_bytes())["shards"]
    parts = [shard[key] for shard in shards for key in shard if key.startswith(("raw_", "zip_"))]
    # Without a checksum nothing tells whether two files are the same.
    return {part["basename"]: part.get("hashes") or object() for part in parts if part}


def agree_on_failure(step: Callable[[], None]) -> None:
    """Do something on this rank, then raise on all ranks what any of them met: none waits for one that is gone."""
    from torch import distributed

    failure: StreamError | None = None
    try:
        step()
    except StreamError as error:
        failure = error
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        texts: list[str | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(texts, None if failure is None else failure.to_json())
        failure = failure or next((StreamError.from_json(text) for text in texts if text), None)
    if failure is not None:
        raise failure
