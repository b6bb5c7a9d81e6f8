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
        self._url = url

    def _at(self, name: str) -> tuple[Any, str]:
        """The client, which fsspec makes once a process (some connect at once), and a file's name in its words."""
        import fsspec

        system, root = fsspec.url_to_fs(self._url)
        return system, f"{root}/{name}"

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every file."""
        system, start = self._at("")
        try:
            return {name[len(start) :]: info["size"] for name, info in system.find(start[:-1], detail=True).items()}
        except FileNotFoundError:
            return {}

    def size(self, name: str) -> int:
        """Return a file's size."""
        system, path = self._at(name)
        return system.info(path)["size"]

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole."""
        system, path = self._at(name)
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
        system.pipe_file(path, data)

    def delete(self, name: str) -> None:
        """Delete a file."""
        system, path = self._at(name)
        system.rm_file(path)

    @contextmanager
    def ask(self, name: str, start: int, end: int | None, stall: float) -> Iterator[Answer]:
        """Ask for a file, or for its bytes from `start` up to `end`."""
        yield Answer(f"bytes {start}-", None, self._come(name, start, end))

    def _come(self, name: str, start: int, end: int | None) -> Iterator[bytes]:
        """All bytes at once, read in a thread that is left behind if it hangs."""
        came: list[bytes | BaseException] = []

        def read() -> None:
            try:
                system, path = self._at(name)
                came.append(system.cat_file(path, start or None, end))
            except BaseException as error:
                came.append(error)

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.05)
            yield b""
        if isinstance(came[0], BaseException):
            rule = "missing" if isinstance(came[0], FileNotFoundError) else "unreachable"
            raise Fault(rule, named(came[0]), "check the place and the rights", transient=rule == "unreachable")
        yield came[0]
