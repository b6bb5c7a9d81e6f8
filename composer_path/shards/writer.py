"""Writes the MDS shards of one partition, each verified by reading it back.

The files are byte for byte what streaming's MDSWriter makes of the same samples (a test compares them). It isn't used
itself because it publishes an index after an exception, holds a shard three times in memory while it writes it, and
takes seconds to import in every process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import xxhash

from composer_path.storage.places import Bucket, Folder, StorageError

# Streaming knows more; these are those that anybody should choose, by their names in an index.
HASHES: dict[str, Callable[[], Any]] = {
    "md5": lambda: hashlib.md5(usedforsecurity=False),
    "sha1": lambda: hashlib.sha1(usedforsecurity=False),
    "sha256": hashlib.sha256,
    "sha512": hashlib.sha512,
    "xxh128": xxhash.xxh128,
    "xxh32": xxhash.xxh32,
    "xxh3_128": xxhash.xxh3_128,
    "xxh3_64": xxhash.xxh3_64,
    "xxh64": xxhash.xxh64,
}
_ENCODERS: dict[str, Callable[[Any], bytes]] = {
    "bytes": lambda value: value,
    "json": lambda value: json.dumps(value).encode(),
    "str": lambda value: value.encode(),
}
# Offsets within a shard are uint32.
_MAX_SHARD_BYTES = 2**32 - 1


class ShardWriter:
    """Cuts samples into shards of a size and writes each one whole.

    Args:
        place: where the data set lies.
        prefix: folder within it for these shards.
        columns: encoding of each column: bytes, json or str.
        size_limit: size of a shard in bytes; one sample that is larger gets its own shard.
        hashes: checksums kept in the index, keys of ``HASHES``.

    Attributes:
        shards: index entries of the shards written so far.
        files: name below the prefix, bytes and xxh64 of each file written so far.
    """

    def __init__(
        self, place: Folder | Bucket, prefix: str, columns: Mapping[str, str], size_limit: int, hashes: Sequence[str]
    ) -> None:
        self._place, self._prefix = place, prefix
        self._names = sorted(columns)
        self._encoders = [_ENCODERS[columns[name]] for name in self._names]
        self._config: dict[str, Any] = {
            "version": 2,
            "format": "mds",
            "compression": None,  # zstd saves nothing on JPEG and takes three times as long
            "hashes": sorted(hashes),
            "size_limit": size_limit,
            "column_names": self._names,
            "column_encodings": [columns[name] for name in self._names],
            "column_sizes": [None] * len(columns),
        }
        self._config_bytes = json.dumps(self._config, sort_keys=True).encode()
        self._samples: list[list[bytes]] = []
        self._sizes: list[int] = []
        self._num_bytes = self._empty_bytes
        self.shards: list[dict[str, Any]] = []
        self.files: list[dict[str, Any]] = []
        self._sender = ThreadPoolExecutor(1)  # one shard travels while the next one is made
        self._sending: Future[None] | None = None

    @property
    def _empty_bytes(self) -> int:
        return 4 + 4 + len(self._config_bytes)

    def write(self, sample: Mapping[str, Any]) -> int:
        """Add a sample and return its size in bytes. A value may be a list of parts, which are never copied.

        Raises:
            StorageError: an earlier shard could not be written.
            ValueError: the sample is too large for any shard.
        """
        values = [_parts(encode, sample[name]) for encode, name in zip(self._encoders, self._names, strict=True)]
        sizes = [sum(map(len, value)) for value in values]
        num_bytes = 4 * len(sizes) + sum(sizes)
        if self._empty_bytes + 4 + num_bytes > _MAX_SHARD_BYTES:
            raise ValueError(f"a sample must be smaller than 4 GB, found {num_bytes} bytes; give it fewer images")
        if self._samples and self._num_bytes + 4 + num_bytes > self._config["size_limit"]:
            self._flush()
        self._samples.append([np.array(sizes, np.uint32).tobytes(), *(part for value in values for part in value)])
        self._sizes.append(num_bytes)
        self._num_bytes += 4 + num_bytes
        return num_bytes

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
        self._place.write(f"{self._prefix}/{name}", [data])

    def close(self) -> None:
        """Let go of the thread."""
        self._sender.shutdown(wait=True, cancel_futures=True)

    def _flush(self) -> None:
        samples, self._samples = self._samples, []
        sizes, self._sizes = self._sizes, []
        self._num_bytes = self._empty_bytes
        offsets = np.zeros(len(samples) + 1, np.uint32)
        offsets[1:] = np.cumsum(sizes)
        offsets += np.uint32(4 + offsets.nbytes + len(self._config_bytes))
        parts = [np.uint32(len(samples)).tobytes(), offsets.tobytes(), self._config_bytes]
        parts += (part for sample in samples for part in sample)
        hashes = {name: _hash(name, parts) for name in self._config["hashes"]}
        name, size = f"shard.{len(self.shards):05}.mds", sum(map(len, parts))
        raw = {"basename": f"{self._prefix}/{name}", "bytes": size, "hashes": hashes}
        entry = {"samples": len(samples), "raw_data": raw, "zip_data": None}
        self.shards.append({**self._config, **entry})
        self._wait()
        xxh64 = hashes.get("xxh64") or _hash("xxh64", parts)
        self._sending = self._sender.submit(self._send, name, parts, xxh64, size)

    def _wait(self) -> None:
        if self._sending is not None:
            sending, self._sending = self._sending, None
            sending.result()

    def _send(self, name: str, parts: list[bytes], xxh64: str, size: int) -> None:
        path = f"{self._prefix}/{name}"
        self._place.write(path, parts)
        verify(self._place, path, size, xxh64)
        self.files.append({"name": name, "bytes": size, "xxh64": xxh64})


def verify(place: Folder | Bucket, name: str, size: int, xxh64: str) -> None:
    """Read a file back and compare it with what was written.

    Raises:
        StorageError: it isn't there or differs.
    """
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


def _parts(encode: Callable[[Any], bytes], value: Any) -> list[bytes]:
    return value if isinstance(value, list) else [encode(value)]


def _hash(name: str, parts: Iterable[bytes]) -> str:
    hash = HASHES[name]()
    for part in parts:
        hash.update(part)
    return hash.hexdigest()
