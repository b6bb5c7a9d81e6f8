"""Stores that are neither S3 nor Google's: whatever fsspec knows, with the package that it asks for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from composer_path.storage.errors import Fault, named
from composer_path.storage.store import Store
from composer_path.storage.transfer import Answer

# fsspec's own way to S3 knows other variables than ours, and what lies behind http can't be listed.
_REFUSED = ("s3a", "s3n", "http", "https")


def why_unreadable(scheme: str) -> str:
    """Why addresses of a scheme can't be read, in a few words; "" if they can."""
    import fsspec

    try:
        if scheme not in _REFUSED:
            fsspec.get_filesystem_class(scheme)
            return ""
    except ImportError as error:
        return f"asks for a package that isn't installed ({named(error)})"
    except ValueError:
        pass
    return "isn't known"


class FsspecStore(Store):
    """A folder of such a store."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._scheme = url.partition("://")[0]
        self._root = self._system._strip_protocol(url)

    @property
    def _system(self) -> Any:
        import fsspec

        return fsspec.filesystem(self._scheme)  # fsspec makes it once a process

    def key(self, name: str) -> str:
        """Name of a file in fsspec's words."""
        return f"{self._root}/{name}"

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every file."""
        try:
            found = self._system.find(self._root, detail=True)
        except FileNotFoundError:
            return {}
        return {name[len(self._root) :].lstrip("/"): info["size"] for name, info in found.items()}

    def size(self, name: str) -> int:
        """Return a file's size."""
        return self._system.info(self.key(name))["size"]

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole."""
        self._system.makedirs(self.key(name).rpartition("/")[0], exist_ok=True)
        self._system.pipe_file(self.key(name), data)

    def delete(self, name: str) -> None:
        """Delete a file."""
        self._system.rm_file(self.key(name))

    @contextmanager
    def ask(self, name: str, start: int, end: int | None, stall: float) -> Iterator[Answer]:
        """Ask for a file, or for its bytes from `start` up to `end`."""
        yield Answer(f"bytes {start}-", None, self._come(name, start, end))

    def _come(self, name: str, start: int, end: int | None) -> Iterator[bytes]:
        """All bytes at once, read in a thread that is left behind if it hangs."""
        came: list[bytes | BaseException] = []

        def read() -> None:
            try:
                came.append(self._system.cat_file(self.key(name), start or None, end))
            except BaseException as error:
                came.append(error)

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.05)
            yield b""
        if isinstance(came[0], BaseException):
            missing = isinstance(came[0], FileNotFoundError)
            rule = "missing" if missing else "unreachable"
            raise Fault(rule, named(came[0]), "check the place and the rights", transient=not missing)
        yield came[0]
