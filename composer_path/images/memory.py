"""How much memory the pictures of a conversion may take at once, whatever arrives.

Half of it is shared out: each process that examines pictures has its share. A picture that takes more than a share
waits until no other such one is examined on this machine, and has the other half for itself.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_UNITS = {"mb": 2**20, "gb": 2**30}
IMAGE_MEMORY = "8gb"
_LEAST = 2**28
_here = threading.Lock()


@dataclass(frozen=True)
class ImageMemory:
    """A number of bytes, and how many processes share it."""

    num_bytes: int = 8 * 2**30
    num_processes: int = 1

    @property
    def share(self) -> int:
        """What one of the processes may always take."""
        return self.num_bytes // 2 // self.num_processes

    @property
    def largest(self) -> int:
        """What one picture may take at most."""
        return self.num_bytes // 2

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While no other large picture is examined, here or in another process of this user."""
        path = Path(tempfile.gettempdir(), f"composer_path-{os.getuid()}.large-image")
        with ExitStack() as held:
            held.enter_context(_here)
            with suppress(OSError):  # somebody else's file lies there, or locks are unknown: this process alone, then
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
                held.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # ends with the process
            yield


def memory_bytes(text: str) -> int:
    """Bytes of a size such as `6gb`; a `ValueError` says what a size is."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d+)?)\s*(mb|gb)", text.strip().lower())
    found = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if found < _LEAST:
        raise ValueError(f"must be a size of 256mb or more, such as {IMAGE_MEMORY}, found {text!r}")
    return found
