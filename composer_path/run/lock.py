"""One process group a folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"


@contextmanager
def locked(folder: Path, what: str, fix: str) -> Iterator[None]:
    """Hold a folder; it is made if need be.

    Args:
        folder: The folder.
        what: Who may hold it, for the message.
        fix: What to do where somebody does.

    Raises:
        ValueError: Another process holds it.
    """
    if int(os.environ.get("RANK", "0")):  # of several processes of one work, the first holds it for all
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            raise ValueError(f"{folder}: one {what} at a time, found another one at work ({holder}); {fix}") from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(descriptor)
