"""Places that files are read from and written to: a local folder, or a bucket (`s3://...`, `gs://...`).

A file appears whole or not at all: a local one is written under another name and renamed, an object appears when its
upload has ended. To add a kind of bucket: a `Store` with its abstract methods (store.py; checkpoints need `write_file`
too), and its scheme in `_STORES` here.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from composer_path.storage.atomic import sync_path, write_whole
from composer_path.storage.elsewhere import FsspecStore, why_unreadable
from composer_path.storage.errors import Fault, StorageError, explained, shown, source_fault
from composer_path.storage.google import google_store
from composer_path.storage.lock import LOCK
from composer_path.storage.s3 import S3Store
from composer_path.storage.store import Store
from composer_path.storage.transfer import Answer, Limits, fetch

_CHUNK_BYTES = 4 * 2**20
# Seconds between the attempts of one request: a store that rests for a minute costs no conversion.
_PAUSES = (1, 2, 4, 8, 16, 30)
_OF_OBJECTS = ("read", "delete from")  # there what is missing is an object, and the place is as it should be

Result = TypeVar("Result")


def is_remote(url: str | Path) -> bool:
    """Whether it is an address with a scheme (`s3://bucket/folder`) and not a path."""
    return isinstance(url, str) and "://" in url


def check_readable(url: str | Path) -> None:
    """Raise `StorageError` if nothing here can read an address of this scheme; nothing is asked for there."""
    scheme, sign, _ = os.fspath(url).partition("://")
    if sign and scheme not in _STORES and (why := why_unreadable(scheme)):
        rule = "must be a folder, s3://, gs://, or, with its package, what fsspec knows (az://, sftp://, hf://)"
        raise StorageError(f"{shown(url)}: {rule}; found {scheme}://, which {why}; copy the files to one of these")


class Folder:
    """A folder on a disk; made with the first file that is written."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    def files(self) -> dict[str, int]:
        """Return the size in bytes of every file below but its lock, by name relative to it ('/' between parts)."""
        return {
            Path(root, name).relative_to(self.path).as_posix(): os.lstat(os.path.join(root, name)).st_size
            for root, _, names in os.walk(self.path)
            for name in names
            if name != LOCK or Path(root) != self.path
        }

    def links(self) -> list[str]:
        """Return the names of symbolic links below, which none of the others follows."""
        return sorted(
            Path(root, name).relative_to(self.path).as_posix()
            for root, folders, names in os.walk(self.path)
            for name in (*folders, *names)
            if os.path.islink(os.path.join(root, name))
        )

    def read(self, name: str) -> bytes:
        """Read a file; FileNotFoundError if there is none."""
        return (self.path / name).read_bytes()

    def write(self, name: str, parts: Sequence[bytes], durable: bool = False) -> None:
        """Write a file from its parts, whole or not at all; if `durable`, no power cut can take it afterwards."""
        write_whole(self.path / name, lambda file: file.writelines(parts), durable=durable)

    def delete(self, names: Iterable[str]) -> None:
        """Delete files and the folders that become empty, this one included if nothing is in it."""
        folders = {self.path}
        for name in names:
            path = self.path / name
            path.unlink(missing_ok=True)
            folders.update(parent for parent in path.parents if parent.is_relative_to(self.path))
        for folder in sorted(folders, key=lambda path: -len(path.parts)):
            with suppress(OSError):  # not empty, not there, or a mount point
                folder.rmdir()

    def take(self, other: Folder, name: str) -> None:
        """Move a folder from another place here, at once; an earlier one of its name goes before."""
        prefix = f"{name}/"
        self.delete([file for file in self.files() if file.startswith(prefix)])
        os.rename(other.path / name, self.path / name)

    def digest(self, name: str) -> tuple[int, str]:
        """Read a file back and return its size and xxh64."""
        return _digest(open(self.path / name, "rb"))

    def sync(self, names: Iterable[str]) -> None:
        """Return only when a power cut can no longer take these files."""
        paths = [self.path / name for name in names]
        for path in (*paths, *{self.path, *(path.parent for path in paths)}):
            sync_path(path)

    def fetch(self, name: str, to: Path, limits: Limits) -> None:
        """Copy a file in one attempt, see `storage.transfer.fetch`; this folder's faults are told from the other's."""
        fetch(lambda _: nullcontext(Answer(None, None, self._pieces(name))), to, limits, goes_on=False)

    def _pieces(self, name: str) -> Iterator[bytes]:
        try:
            with open(self.path / name, "rb") as file:
                while data := file.read(_CHUNK_BYTES):
                    yield data
        except OSError as error:
            raise source_fault(error) from None


class Bucket:
    """A folder of a bucket, or whatever else fsspec can reach. Requests are repeated for about a minute.

    Whatever the store answers but that there is no such file is a `StorageError`, by every method but `fetch`.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        check_readable(self.url)
        self._store = _STORES.get(self.url.partition("://")[0], FsspecStore)(self.url)

    def __str__(self) -> str:
        return shown(self.url)

    def files(self) -> dict[str, int]:
        """Return the size in bytes of every object below, by name relative to the folder."""
        return self._ask("list", self._store.sizes)

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Read an object, or its bytes from `start` up to `end`; FileNotFoundError if there is none."""
        return self._ask("read", self._store.read, name, start, end)

    def size(self, name: str) -> int:
        """Return an object's size; FileNotFoundError if there is none."""
        return self._ask("read", self._store.size, name)

    def write(self, name: str, parts: Sequence[bytes], durable: bool = False) -> None:
        """Write an object from its parts, whole or not at all."""
        self._ask("write", self._store.write, name, parts[0] if len(parts) == 1 else b"".join(parts))

    def write_file(self, name: str, path: Path) -> None:
        """Write an object from a local file of any size, whole or not at all.

        Raises:
            StorageError: Also where this kind of store is only read.
        """
        if not self._store.takes_files:
            raise StorageError(f"{self}: files are written to s3:// and gs:// only; take one of these, or a folder")
        self._store.write_file(name, path, partial(self._ask, "write"))

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects."""
        for name in names:
            with suppress(FileNotFoundError):  # an attempt whose answer was lost
                self._ask("delete from", self._store.delete, name)

    def take(self, other: Bucket, name: str) -> None:
        """Copy a folder from another place here, object by object; an earlier one of its name goes before."""
        prefix = f"{name}/"
        self.delete([file for file in self.files() if file.startswith(prefix)])
        for file in other.files():
            if file.startswith(prefix):
                self.write(file, [other.read(file)])

    def digest(self, name: str) -> tuple[int, str]:
        """Read an object back from the store and return its size and xxh64."""
        return _digest(self.open(name))

    def open(self, name: str) -> io.BufferedReader:
        """Open an object for reading piece by piece; FileNotFoundError if there is none."""
        return io.BufferedReader(_StoredObject(self, name), _CHUNK_BYTES)

    def sync(self, names: Iterable[str]) -> None:
        """Do nothing: what a store has confirmed is durable."""

    def fetch(self, name: str, to: Path, limits: Limits) -> None:
        """Bring an object in one attempt, see `storage.transfer.fetch`; goes on where a cut transfer stopped."""
        fetch(lambda start: self._store.ask(name, start, None, limits.stall), to, limits, goes_on=True)

    def _ask(self, verb: str, request: Callable[..., Result], *arguments: Any) -> Result:
        """Make a request, and make it again while another attempt may succeed."""
        with explained(self.url, verb):
            for pause in (*_PAUSES, None):
                try:
                    return request(*arguments)
                except Fault as fault:
                    if fault.rule == "missing" and verb in _OF_OBJECTS and "NoSuchBucket" not in fault.found:
                        raise FileNotFoundError("no such object") from None
                    if pause is None or not fault.transient:
                        raise
                time.sleep(pause * random.uniform(0.7, 1.0))
        raise AssertionError("unreachable")


_STORES: dict[str, Callable[[str], Store]] = {"s3": S3Store, "gs": google_store, "gcs": google_store}


def open_place(url: str | Path) -> Folder | Bucket:
    """Return the place of a path or an address."""
    return Bucket(os.fspath(url)) if is_remote(url) else Folder(url)


def open_file(url: str | Path) -> io.BufferedReader:
    """Open one file for reading, on a disk or in a bucket."""
    folder, _, name = os.fspath(url).rpartition("/")
    return Bucket(folder).open(name) if is_remote(url) else open(url, "rb")


def copy_to_disk(place: Bucket, name: str, path: Path) -> None:
    """Bring an object to a local file, for programs that need one."""
    with place.open(name) as source, open(path, "wb") as target:
        shutil.copyfileobj(source, target, _CHUNK_BYTES)


class _StoredObject(io.RawIOBase):
    """An object opened for reading, fetched in ranges."""

    def __init__(self, place: Bucket, name: str) -> None:
        super().__init__()
        self._place, self._name, self._size, self._at = place, name, place.size(name), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        data = self._place.read(self._name, self._at, end) if self._at < end else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _digest(file: io.BufferedReader) -> tuple[int, str]:
    hash = xxhash.xxh64()
    with file:
        while data := file.read(4 * _CHUNK_BYTES):
            hash.update(data)
        return file.tell(), hash.hexdigest()
