"""Keeps shards open, and reads rows of them as Streaming does, value for value, at the cost of reading a file.

Streaming opens the shard for each row and copies its bytes three times. Here files stay open, and a large value is read
straight into its place. A training sample is made of a row by `ConversationDataset.to_sample` (batches/dataset.py).
"""

from __future__ import annotations

import os
from functools import partial
from operator import attrgetter
from typing import Any

from streaming.base.format import Reader
from streaming.base.format.mds.reader import MDSReader

from composer_path.shards.mds import DECODERS, MdsFile

_MAX_OPEN = 64  # files a process; many systems allow 1024
_state = attrgetter("st_dev", "st_ino", "st_size", "st_mtime_ns")


class SampleReader:
    """Reads single samples of shards that lie on this machine. Threads and forked processes may share one."""

    def __init__(self) -> None:
        self._open: dict[int, _OpenShard] = {}  # by identity: a dataset keeps its shards for as long as it lives

    def __reduce__(self) -> tuple[type[SampleReader], tuple[()]]:
        return SampleReader, ()  # another process opens its own files

    def read(self, shard: Reader, number: int) -> dict[str, Any] | None:
        """Return the columns of a shard's sample, or raise `DamagedShard` if the file's bytes aren't one.

        None if the file isn't there, or Streaming has to read it as its format is another one.
        """
        opened = self._open.get(id(shard))
        if opened is None or not opened.is_current():
            if type(shard) is not MDSReader or any(shard.column_sizes) or set(shard.column_encodings) - set(DECODERS):
                return None
            # A file that was removed from the cache keeps its room on the disk for as long as it is open.
            current = [(key, other) for key, other in list(self._open.items()) if other.is_current()]
            self._open = dict(current[1 - _MAX_OPEN :])
            try:
                opened = self._open[id(shard)] = _OpenShard(shard)
            except FileNotFoundError:
                return None
        return opened.mds.read(number)


class _OpenShard:
    """A shard's open file."""

    def __init__(self, shard: MDSReader) -> None:
        name = shard.raw_data.basename
        self.path = os.path.join(shard.dirname, shard.split, name)
        self.file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self.state = _state(os.fstat(self.file))
        columns = dict(zip(shard.column_names, shard.column_encodings, strict=True))
        self.mds = MdsFile(partial(os.pread, self.file), os.fstat(self.file).st_size, name, shard.samples, columns)
        self.mds.check()  # once, and no sample's place has to be asked for again

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
