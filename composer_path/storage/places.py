"""Places that files are read from and written to: a local folder, or a bucket (``s3://...``, ``gs://...``).

A file appears whole or not at all: a local one is written under another name and renamed, an object appears when its
upload has ended.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import xxhash

# A name that no finished file has; what is left of it belongs to a process that was killed.
TEMPORARY_SUFFIX = ".unfinished"
_CHUNK_BYTES = 4 * 2**20


class StorageError(OSError):
    """A place can't be reached, read or written; not the fault of any record."""


def is_remote(url: str | Path) -> bool:
    """Whether it is an address with a scheme (``s3://bucket/folder``) and not a path."""
    return isinstance(url, str) and "://" in url


def shown(url: str | Path) -> str:
    """Return an address as it may be shown: without a name and password in it."""
    text = os.fspath(url)
    if not is_remote(text):
        return text
    scheme, rest = text.split("://", 1)
    netloc, slash, path = rest.partition("/")
    return f"{scheme}://{netloc.rpartition('@')[2]}{slash}{path.partition('?')[0]}"


class Folder:
    """A folder on a disk.

    Attributes:
        path: the folder; made with the first file that is written.
    """

    is_remote = False

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    def files(self) -> dict[str, int]:
        """Return the size in bytes of every file below, by name relative to the folder ('/' between parts)."""
        return {
            Path(root, name).relative_to(self.path).as_posix(): os.lstat(os.path.join(root, name)).st_size
            for root, _, names in os.walk(self.path)
            for name in names
        }

    def read(self, name: str) -> bytes:
        """Read a file; FileNotFoundError if there is none."""
        return (self.path / name).read_bytes()

    def write(self, name: str, parts: Sequence[bytes], durable: bool = False) -> None:
        """Write a file from its parts, whole or not at all.

        Args:
            name: relative to the folder.
            parts: joined they are the content.
            durable: return only when a power cut can no longer take it.
        """
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # The process id keeps two processes that write the same file apart; both write the same.
        temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
        try:
            with open(temporary, "wb") as file:
                file.writelines(parts)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            _sync_folder(path.parent)

    def delete(self, names: Iterable[str]) -> None:
        """Delete files and the folders that become empty, this one included if nothing is in it."""
        folders = {self.path}
        for name in names:
            path = self.path / name
            path.unlink(missing_ok=True)
            folders.update(parent for parent in path.parents if parent.is_relative_to(self.path))
        for folder in sorted(folders, key=lambda path: -len(path.parts)):
            try:
                folder.rmdir()
            except OSError:  # not empty, not there, or a mount point
                continue

    def digest(self, name: str) -> tuple[int, str]:
        """Read a file back and return its size and xxh64."""
        with open(self.path / name, "rb") as file:
            return _digest(iter(lambda: file.read(_CHUNK_BYTES), b""))

    def sync(self, names: Iterable[str]) -> None:
        """Return only when a power cut can no longer take these files."""
        folders = {self.path}
        for name in names:
            descriptor = os.open(self.path / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            folders.add((self.path / name).parent)
        for folder in folders:
            _sync_folder(folder)


class Bucket:
    """A folder of a bucket, or whatever else fsspec can reach.

    Raises:
        StorageError: by every method, for whatever the store answers but that there is no such file.
    """

    is_remote = True

    def __init__(self, url: str) -> None:
        from composer_path.storage.object_store import file_system

        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        with explained(self.url, "reach"):
            self._system = file_system(parts.scheme)
        self._root = self._system._strip_protocol(self.url)

    def __str__(self) -> str:
        return shown(self.url)

    def files(self) -> dict[str, int]:
        """Return the size in bytes of every object below, by name relative to the folder."""
        with explained(self.url, "list"):
            try:
                found = self._system.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
        return {name[len(self._root) :].lstrip("/"): info["size"] for name, info in found.items()}

    def read(self, name: str) -> bytes:
        """Read an object; FileNotFoundError if there is none."""
        with explained(self.url, "read"):
            return self._system.cat_file(f"{self._root}/{name}")

    def write(self, name: str, parts: Sequence[bytes], durable: bool = False) -> None:
        """Write an object from its parts, whole or not at all."""
        path = f"{self._root}/{name}"
        with explained(self.url, "write"):
            if getattr(self._system, "cachable", False):  # not an object store of ours: it may have folders
                self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._system.pipe_file(path, parts[0] if len(parts) == 1 else b"".join(parts))

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects."""
        with explained(self.url, "delete from"):
            for name in names:
                self._system.rm_file(f"{self._root}/{name}")

    def digest(self, name: str) -> tuple[int, str]:
        """Read an object back from the store and return its size and xxh64."""
        path = f"{self._root}/{name}"
        size = self.size(name)

        def chunks() -> Iterator[bytes]:
            step = 4 * _CHUNK_BYTES
            for start in range(0, size, step):
                yield self._system.cat_file(path, start, min(start + step, size))

        with explained(self.url, "read"):
            return _digest(chunks())

    def size(self, name: str) -> int:
        """Return an object's size; FileNotFoundError if there is none."""
        with explained(self.url, "read"):
            return self._system.info(f"{self._root}/{name}")["size"]

    def open(self, name: str) -> Any:
        """Open an object for reading piece by piece."""
        with explained(self.url, "read"):
            return self._system.open(f"{self._root}/{name}", "rb")

    def sync(self, names: Iterable[str]) -> None:
        """Do nothing: what a store has confirmed is durable."""


def open_place(url: str | Path) -> Folder | Bucket:
    """Return the place of a path or an address."""
    return Bucket(os.fspath(url)) if is_remote(url) else Folder(url)


def open_file(url: str | Path) -> Any:
    """Open one file for reading, on a disk or in a bucket."""
    if not is_remote(url):
        return open(url, "rb")
    folder, _, name = os.fspath(url).rpartition("/")
    return Bucket(folder).open(name)


def copy_to_disk(place: Bucket, name: str, path: Path) -> None:
    """Bring an object to a local file, for programs that need one."""
    with place.open(name) as source, open(path, "wb") as target:
        shutil.copyfileobj(source, target, _CHUNK_BYTES)


def _digest(chunks: Iterable[bytes]) -> tuple[int, str]:
    hash, size = xxhash.xxh64(), 0
    for chunk in chunks:
        hash.update(chunk)
        size += len(chunk)
    return size, hash.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained(url: str, verb: str) -> Iterator[None]:
    """Turn whatever a store's client raises into one error that names the place and holds no secret."""
    try:
        yield
    except (FileNotFoundError, StorageError):
        raise
    except Exception as error:  # every client has its own errors
        text = f"{type(error).__name__}: {error}"
        for name, value in os.environ.items():
            if len(value) > 5 and any(word in name for word in ("KEY", "SECRET", "TOKEN", "PASSWORD")):
                text = text.replace(value, "***")
        raise StorageError(f"{shown(url)}: can't {verb} it, found {text[:500]}; check address and rights") from None
