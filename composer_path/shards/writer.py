"""Writes the shards of one folder of a set, each verified by reading it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import xxhash

from composer_path.shards.mds import Entry, MdsFormat, hash_of
from composer_path.storage.errors import StorageError
from composer_path.storage.places import Bucket, Folder


class ShardWriter:
    """Cuts samples into shards of a size and writes each one whole, into a folder within a set's place.

    One sample that is larger than `size_limit`, in bytes, gets its own shard. Before each file `require_own` is asked,
    which raises if the place is another writer's by now.
    """

    def __init__(
        self,
        place: Folder | Bucket,
        prefix: str,
        columns: Mapping[str, str],
        size_limit: int,
        hashes: Sequence[str],
        require_own: Callable[[], None] = lambda: None,
    ) -> None:
        self._place, self._prefix, self.require_own = place, prefix, require_own
        self._format = MdsFormat(columns, size_limit, hashes)
        self._samples: list[list[bytes]] = []
        self._num_bytes = 0  # of the samples
        self.shards: list[Entry] = []  # written so far
        self.files: list[dict[str, Any]] = []  # name below the prefix, bytes and xxh64 of each written so far
        self._sender = ThreadPoolExecutor(1)  # one shard travels while the next one is made
        self._sending: Future[None] | None = None

    def write(self, sample: Mapping[str, Any]) -> None:
        """Add a sample; see `MdsFormat.encode`. A `StorageError` may be an earlier shard's."""
        parts = self._format.encode(sample)
        num_bytes = sum(map(len, parts))
        size = self._format.file_size(len(self._samples) + 1, self._num_bytes + num_bytes)
        if self._samples and size > self._format.size_limit:
            self._flush()
        self._samples.append(parts)
        self._num_bytes += num_bytes

    def finish(self) -> None:
        """Write the last shard and wait until all are verified."""
        if self._samples:
            self._flush()
        self._wait()

    def write_file(self, name: str, data: bytes) -> None:
        """Write another file of the partition, verified as well."""
        self._send(name, [data], xxhash.xxh64(data).hexdigest(), len(data))

    def write_marker(self, name: str, data: bytes) -> None:
        """Write the file that says that all others are there."""
        self.require_own()
        self._place.write(f"{self._prefix}/{name}", [data])

    def close(self) -> None:
        """Let go of the thread."""
        self._sender.shutdown(wait=True, cancel_futures=True)

    def _flush(self) -> None:
        name = f"shard.{len(self.shards):05}.mds"
        parts, entry = self._format.join(self._samples, f"{self._prefix}/{name}")
        self._samples, self._num_bytes = [], 0
        self.shards.append(entry)
        self._wait()
        info = entry["raw_data"]
        xxh64 = info["hashes"].get("xxh64") or hash_of("xxh64", parts)
        self._sending = self._sender.submit(self._send, name, parts, xxh64, info["bytes"])

    def _wait(self) -> None:
        if self._sending is not None:
            sending, self._sending = self._sending, None
            sending.result()

    def _send(self, name: str, parts: list[bytes], xxh64: str, size: int) -> None:
        path = f"{self._prefix}/{name}"
        self.require_own()
        self._place.write(path, parts)
        verify(self._place, path, size, xxh64)
        self.files.append({"name": name, "bytes": size, "xxh64": xxh64})


def verify(place: Folder | Bucket, name: str, size: int, xxh64: str) -> None:
    """Read a file back and compare it with what was written; a `StorageError` says that it isn't there or differs."""
    try:
        found_size, found_hash = place.digest(name)
    except FileNotFoundError:
        raise StorageError(f"{place}: {name} must be there, found nothing; convert again with --resume") from None
    if (found_size, found_hash) != (size, xxh64):
        found = f"{found_size} bytes and another hash" if found_size == size else f"{found_size} bytes"
        raise StorageError(
            f"{place}: {name} must be the {size} bytes that were written, found {found}; check the disk or the store "
            "and convert again with --resume"
        )
