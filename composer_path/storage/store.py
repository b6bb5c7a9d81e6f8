"""What the stores of buckets have in common: how bytes are asked for, and clients that are made once a process.

To add a kind of bucket: a `Store` in a file of its own, as in s3.py, and its scheme in `_STORES` of places.py.
"""

from __future__ import annotations

import functools
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

from composer_path.storage.errors import passing
from composer_path.storage.transfer import Answer

STALL_SECONDS = 60.0  # a dead connection is noticed, a slow one isn't cut off
CONNECT_SECONDS = 10.0
_PIECE_BYTES = 1 << 20
_SETTINGS = ("AWS_", "S3_", "GOOGLE_", "GCS_", "STORAGE_")

_clients: dict[Hashable, Any] = {}
_lock = threading.Lock()


Attempts = Callable[..., Any]  # makes a request (a method and its arguments), again while that may help


class Store(ABC):
    """Objects below an address, by name relative to it; every method is one attempt, and raises `Fault`.

    Attributes:
        takes_files: Whether it has `write_file`, which checkpoints in a bucket need; others are for sets of shards.
    """

    takes_files: ClassVar[bool] = False

    def __init__(self, url: str) -> None:
        self.bucket, _, self.prefix = url.partition("://")[2].strip("/").partition("/")

    def key(self, name: str) -> str:
        """Name of an object in its bucket."""
        return f"{self.prefix}/{name}" if self.prefix else name

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every object."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Return an object's size."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write an object whole; it appears when all of it has arrived."""

    def write_file(self, name: str, path: Path, attempts: Attempts) -> None:
        """Write an object from a local file of any size, by attempts at single requests."""
        raise NotImplementedError

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete an object."""

    @abstractmethod
    def ask(self, name: str, start: int, end: int | None, stall: float) -> AbstractContextManager[Answer]:
        """Ask for an object, or for its bytes from `start` up to `end`."""

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Read an object, or its bytes from `start` up to `end`."""
        with self.ask(name, start, end, STALL_SECONDS) as answer:
            first = answer.first(start)
            data = b"".join(answer.pieces)
        if answer.length is not None and len(data) < answer.length:
            raise passing("cut", f"{len(data):,} of {answer.length:,} bytes arrived")
        return data if first == start else data[start:end]


def wanted_range(start: int, end: int | None) -> dict[str, str]:
    """The header that asks for a part of an object; none for all of it."""
    return {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if start or end is not None else {}


def pieces(raw: Any) -> Iterator[bytes]:
    """Bytes of an answer of urllib3 as soon as they are there, as they were sent, not unpacked."""
    read = functools.partial(raw.read1, _PIECE_BYTES) if hasattr(raw, "read1") else functools.partial(raw.read, 1 << 14)
    while data := read(decode_content=False):
        yield data


def client_of(key: Hashable, connect: Callable[[], Any]) -> Any:
    """Return a store's client, made once (it takes 0.2 s) for all threads of a process and these settings."""
    settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith(_SETTINGS)))
    with _lock:
        if (key, settings) not in _clients:
            _clients[key, settings] = connect()
        return _clients[key, settings]


def _forget_clients() -> None:
    """Neither connections nor a lock that another thread holds are shared by a fork."""
    global _lock
    _lock = threading.Lock()
    _clients.clear()


os.register_at_fork(after_in_child=_forget_clients)
