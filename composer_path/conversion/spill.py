"""Rows sorted by hash into temporary files, so that equal rows can be found without holding all in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import IO

# Two million rows of 32 bytes make files of 1 MB each; a hundred million still fit one after the other.
_NUM_FILES = 64
_MAX_BYTES_IN_MEMORY = 8 * 2**20


class SpilledRows:
    """Rows in as many groups as there are files; rows with the same hash come to lie in the same group.

    Small amounts never leave memory. The files have no name, so that nothing stays behind a killed process.
    """

    def __init__(self) -> None:
        self._buffers = [bytearray() for _ in range(_NUM_FILES)]
        self._files: list[IO[bytes]] = []
        self._num_bytes = 0

    def add(self, hash: int, row: bytes) -> None:
        """Add a row to the group of its hash, any number that spreads evenly."""
        self._buffers[hash % _NUM_FILES] += row
        self._num_bytes += len(row)
        if self._num_bytes > _MAX_BYTES_IN_MEMORY:
            self._spill()

    def groups(self) -> Iterator[bytes]:
        """Yield the rows of each group joined, in the order in which they were added."""
        for file in self._files:
            file.seek(0)
        for index, buffer in enumerate(self._buffers):
            yield (self._files[index].read() if self._files else b"") + bytes(buffer)

    def close(self) -> None:
        """Give the disk space back."""
        for file in self._files:
            file.close()
        self._files = []

    def _spill(self) -> None:
        if not self._files:
            self._files = [tempfile.TemporaryFile(buffering=0) for _ in range(_NUM_FILES)]  # noqa: SIM115
        for file, buffer in zip(self._files, self._buffers, strict=True):
            file.write(buffer)
            buffer.clear()
        self._num_bytes = 0
