"""One writer a folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from composer_path.storage.errors import StorageError

log = logging.getLogger(__name__)

LOCK = ".lock"
# Locks of the system are a process's, so its threads tell each other: (folder, part) of each that is held.
_held: set[tuple[str, int | None]] = set()
_guard = threading.Lock()
_PATIENCE = 0.3  # s, in which one that is just ending does so


class AnotherAtWork(StorageError, ValueError):
    """Another process, or thread, writes there."""


@contextmanager
def locked(folder: Path, what: str, fix: str, part: int | None = None) -> Iterator[None]:
    """Hold a folder, which is made if need be; folders that were made and stay empty go at the end.

    Args:
        folder: The folder.
        what: Who may hold it, for the message.
        fix: What to do where somebody does.
        part: Hold only this part of it, from 1: parts may be held by several at once, and the whole by one alone.

    Raises:
        AnotherAtWork: Another one holds it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    name, lock = os.path.realpath(folder), folder / LOCK
    refusal = f"{folder}: one {what} at a time, found another one at work"
    with _guard:
        if any(other == name and (None in (part, theirs) or part == theirs) for other, theirs in _held):
            raise AnotherAtWork(f"{refusal} (in this process); {fix}")
        _held.add((name, part))
    try:
        descriptor = _take(lock, part, refusal, fix)
        try:
            yield
        finally:
            _give_back(lock, descriptor)
    finally:
        _held.discard((name, part))
        with suppress(OSError):  # something lies there
            for path in made:
                path.rmdir()


def _take(lock: Path, part: int | None, refusal: str, fix: str) -> int:
    end = time.monotonic() + _PATIENCE
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)  # who held it may have removed the folder as well
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            _lock(descriptor, part)
            here = os.fstat(descriptor)
            with suppress(FileNotFoundError):
                there = lock.stat()
                if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
                    with suppress(OSError):  # a full disk; it is for the other's message only
                        os.ftruncate(descriptor, 0)
                        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                    return descriptor
        except (BlockingIOError, PermissionError):
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            if time.monotonic() < end:
                time.sleep(_PATIENCE / 10)
                continue
            raise AnotherAtWork(f"{refusal} ({holder}); {fix}") from None
        except OSError as error:
            log.warning("%s can't be locked (%s): see to it that only one process writes there", lock.parent, error)
            return descriptor
        os.close(descriptor)  # who held it has just removed it


def _lock(descriptor: int, part: int | None) -> None:
    """The whole is every byte, a part is one."""
    length, start = (0, 0) if part is None else (1, part)
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)


def _give_back(lock: Path, descriptor: int) -> None:
    """Remove the file, unless another part is at work."""
    with suppress(OSError):
        _lock(descriptor, None)
        lock.unlink()
    os.close(descriptor)
