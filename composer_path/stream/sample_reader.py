"""Reads samples of MDS shards as Streaming does, value for value, at the cost of reading a file of a folder.

Streaming opens the shard for each sample and copies its bytes three times. Here files stay open, and a large value is
read straight into its place.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from streaming.base.format import Reader
from streaming.base.format.mds.reader import MDSReader

from composer_path.shards.mds import DECODERS, MdsFile

_MAX_OPEN = 64  # files a process; many systems allow 1024


class SampleReader:
    """Reads single samples of shards that lie on this machine. Threads and forked processes may share one."""

    def __init__(self) -> None:
        self._open: dict[int, _OpenShard | None] = {}

    def __reduce__(self) -> tuple[type[SampleReader], tuple[()]]:
        return SampleReader, ()  # another process opens its own files

    def read(self, shard: Reader, number: int) -> dict[str, Any] | None:
        """Return a sample's columns.

        Args:
            shard: One of a dataset's shards.
            number: The sample's in the shard, from 0.

        Returns:
            The columns; None if the file isn't there, or Streaming has to read it as its format is another one.

        Raises:
            DamagedShard: The file's bytes aren't a sample.
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
        return opened.mds.read(number)

    def _open_shard(self, shard: Reader) -> _OpenShard | None:
        # A file that was removed from the cache keeps its room on the disk for as long as it is open.
        for key, other in list(self._open.items()):
            if other is not None and not other.is_current():
                self._open.pop(key, None)
        if type(shard) is not MDSReader or any(shard.column_sizes) or not set(shard.column_encodings) <= set(DECODERS):
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
        name = shard.raw_data.basename
        self.path = os.path.join(shard.dirname, shard.split, name)
        self.file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self.state = _state(os.fstat(self.file))
        columns = dict(zip(shard.column_names, shard.column_encodings, strict=True))
        self.mds = MdsFile(partial(os.pread, self.file), self.state[2], name, shard.samples, columns)

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


def _state(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
