"""Bytes that two processes hand to each other in memory they share: much sooner than through a pipe."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass

# What is longer is given back to the system as soon as it was read.
_KEPT = 2**24


@dataclass(frozen=True)
class SharedBytes:
    """A file without a name, of which both processes have a descriptor; one writes, says so, and the other reads."""

    descriptor: int

    @classmethod
    def new(cls) -> SharedBytes:
        """Make one: in memory, where the system has such files."""
        if hasattr(os, "memfd_create"):
            return cls(os.memfd_create("composer_path"))
        with tempfile.TemporaryFile() as file:
            return cls(os.dup(file.fileno()))

    def write(self, data: bytes) -> None:
        """Put bytes there in place of what lay there."""
        view, place = memoryview(data), 0
        while place < len(data):
            place += os.pwrite(self.descriptor, view[place:], place)

    def read(self, num_bytes: int) -> bytes:
        """The bytes that the other has written; an `OSError` where there are fewer."""
        parts, place = [], 0
        while place < num_bytes:
            part = os.pread(self.descriptor, num_bytes - place, place)
            if not part:
                raise OSError("there are fewer bytes than were said")
            parts.append(part)
            place += len(part)
        if num_bytes > _KEPT:
            os.ftruncate(self.descriptor, 0)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Give this process's descriptor back."""
        os.close(self.descriptor)
