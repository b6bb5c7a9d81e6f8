"""Reads samples of MDS shards as Streaming does, value for value, at the cost of reading a file of a folder.

Streaming opens the shard for each sample and copies its bytes three times. Here files stay open, and a large value is
read straight into its place. What an MDS file holds is written at `composer_path.shards.view.read_shard`.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from streaming.base.format import Reader
from streaming.base.format.mds.reader import MDSReader

_DECODERS: dict[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "str": bytes.decode,
    "json": lambda data: json.loads(data.decode()),
}
_MAX_OPEN = 64  # files a process; many systems allow 1024
_FIRST_READ = 4096  # bytes: a page, in which texts mostly end


class DamagedSample(ValueError):
    """A shard's bytes aren't a sample; says what was found, never text."""


class SampleReader:
    """Reads single samples of shards that lie on this machine. Threads and forked processes may share one."""

    def __init__(self) -> None:
        self._open: dict[int, _OpenShard | None] = {}

    def __reduce__(self) -> tuple[type[SampleReader], tuple[()]]:
        return SampleReader, ()  # another process opens its own files

    def read(self, shard: Reader, number: int) -> dict[str, Any] | None:
        """A sample's columns.

        Args:
            shard: One of a dataset's shards.
            number: The sample's in the shard, from 0.

        Returns:
            The columns; None if the file isn't there, or Streaming has to read it as its format is another one.

        Raises:
            DamagedSample: The file's bytes aren't a sample.
            ValueError: A column's text doesn't decode.
        """
        key = id(shard)  # a dataset keeps its shards for as long as it lives
        opened = self._open.get(key)
        if opened is None:
            if key in self._open or (opened := self._open_shard(shard)) is None:
                return None
        elif not opened.is_current():
            self._open.pop(key, None)
            if (opened := self._open_shard(shard)) is None:
                return None
        return opened.read(number)

    def _open_shard(self, shard: Reader) -> _OpenShard | None:
        # A file that was removed from the cache keeps its room on the disk for as long as it is open.
        for key, other in list(self._open.items()):
            if other is not None and not other.is_current():
                self._open.pop(key, None)
        if type(shard) is not MDSReader or any(shard.column_sizes) or not set(shard.column_encodings) <= set(_DECODERS):
            self._open[id(shard)] = None
            return None
        try:
            opened = _OpenShard(shard)
        except FileNotFoundError:
            return None
        files = [key for key, other in list(self._open.items()) if other is not None]
        if len(files) >= _MAX_OPEN:
            self._open.pop(files[0], None)
        self._open[id(shard)] = opened
        return opened


class _OpenShard:
    """A shard's open file."""

    def __init__(self, shard: MDSReader) -> None:
        self.shard = shard
        self.path = os.path.join(shard.dirname, shard.split, shard.raw_data.basename)
        self.file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self.state = _state(os.fstat(self.file))
        self.size = self.state[2]
        self.columns = [*zip(shard.column_names, map(_DECODERS.__getitem__, shard.column_encodings), strict=True)]
        self.sizes = struct.Struct(f"<{len(self.columns)}I")

    def __del__(self) -> None:
        """Closed when nobody reads from it any more."""
        if hasattr(self, "file"):
            os.close(self.file)

    def is_current(self) -> bool:
        """Whether the file of this name is still the same."""
        try:
            return _state(os.stat(self.path)) == self.state
        except OSError:
            return False

    def read(self, number: int) -> dict[str, Any]:
        """A sample's columns."""
        places = os.pread(self.file, 8, 4 * (number + 1))
        begin, end = struct.unpack("<II", places) if len(places) == 8 else (0, 0)
        if not 0 <= number < self.shard.samples or not begin < end <= self.size:
            raise self._damage(number, f"its place is {begin} to {end}, the file has {self.size} bytes")
        head = os.pread(self.file, min(_FIRST_READ, end - begin), begin)
        header = self.sizes.size
        sizes = self.sizes.unpack_from(head) if len(head) >= header else ()
        if header + sum(sizes) != end - begin or not sizes:
            raise self._damage(number, f"columns of {sum(sizes)} bytes in a sample of {end - begin}")
        starts = [header]
        for size in sizes:
            starts.append(starts[-1] + size)
        columns = {}
        for (name, decode), (start, stop) in zip(self.columns, pairwise(starts), strict=True):
            inside = stop <= len(head)
            value = head[start:stop] if inside else os.pread(self.file, stop - start, begin + start)
            if len(value) != stop - start:
                raise self._damage(number, f"{len(value)} bytes of a column of {stop - start}")
            columns[name] = decode(value)
        return columns

    def _damage(self, number: int, found: str) -> DamagedSample:
        name = self.shard.raw_data.basename
        return DamagedSample(f"{name}: sample {number} of it doesn't fit its shard: {found}; convert the data again")


def _state(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
