"""An MDS file, Streaming's format: written and read here only.

An MDS file is the number of samples and the place of each and of the end (uint32, little endian), the settings of its
set as JSON, then the samples; a sample is the size of each column's value (uint32), then the values. The bytes are
those of streaming's MDSWriter and the values those of its reader (tests compare them). Neither is used: the writer
publishes an index after an exception and holds a shard three times in memory, the reader opens the file for each
sample and copies it three times, and to import them takes seconds.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import xxhash

# Checksums by their names in an index. Streaming knows more; these are those that anybody should choose.
HASHES = ("md5", "sha1", "sha256", "sha512", "xxh128", "xxh32", "xxh3_128", "xxh3_64", "xxh64")
_ENCODERS: dict[str, Callable[[Any], bytes]] = {
    "bytes": lambda value: value,
    "json": lambda value: json.dumps(value).encode(),
    "str": lambda value: value.encode(),
}
DECODERS: dict[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "json": lambda data: json.loads(data.decode()),
    "str": bytes.decode,
}
_MAX_BYTES = 2**32 - 1  # places within a file are uint32
PAGE = 4096  # bytes: in which texts mostly end

Entry = dict[str, Any]  # a shard's in the index of its set
Pread = Callable[[int, int], bytes]  # from (number of bytes, place), as `os.pread` of a file


class ShardError(ValueError):
    """A set that can't be opened, or a file of it that can't be read; never holds text, names or credentials."""


class DamagedShard(ShardError):
    """A shard whose bytes aren't what its index says."""


@dataclass(frozen=True)
class MdsFormat:
    """What the files of a set share, and how samples become such a file."""

    columns: Mapping[str, str]  # encoding of each: bytes, json or str
    size_limit: int  # of a file, in bytes
    hashes: Sequence[str]  # checksums kept in the index, of `HASHES`

    @cached_property
    def _settings(self) -> dict[str, Any]:
        names = sorted(self.columns)
        return {
            "version": 2,
            "format": "mds",
            "compression": None,  # zstd saves nothing on JPEG and takes three times as long
            "hashes": sorted(self.hashes),
            "size_limit": self.size_limit,
            "column_names": names,
            "column_encodings": [self.columns[name] for name in names],
            "column_sizes": [None] * len(names),
        }

    @cached_property
    def _settings_bytes(self) -> bytes:
        return json.dumps(self._settings, sort_keys=True).encode()

    def file_size(self, num_samples: int, sample_bytes: int) -> int:
        """Return the size of a file of so many samples that have so many bytes together."""
        return 4 + 4 * (num_samples + 1) + len(self._settings_bytes) + sample_bytes

    def encode(self, sample: Mapping[str, Any]) -> list[bytes]:
        """Return a sample's parts; a value may be a list of parts, which are never copied."""
        sizes: list[int] = []
        parts: list[bytes] = []
        for name in self._settings["column_names"]:
            value = sample[name]
            encoded = value if isinstance(value, list) else [_ENCODERS[self.columns[name]](value)]
            sizes.append(sum(map(len, encoded)))
            parts += encoded
        num_bytes = 4 * len(sizes) + sum(sizes)
        if self.file_size(1, num_bytes) > _MAX_BYTES:
            raise ValueError(f"a sample must be smaller than 4 GB, found {num_bytes} bytes; give it fewer images")
        return [np.array(sizes, np.uint32).tobytes(), *parts]

    def join(self, samples: Sequence[list[bytes]], name: str) -> tuple[list[bytes], Entry]:
        """Return the parts of a file of encoded samples and its entry of the index, under a name."""
        places = np.zeros(len(samples) + 1, np.uint32)
        places[1:] = np.cumsum([sum(map(len, sample)) for sample in samples])
        places += np.uint32(self.file_size(len(samples), 0))
        parts = [np.uint32(len(samples)).tobytes(), places.tobytes(), self._settings_bytes]
        parts += (part for sample in samples for part in sample)
        hashes = {hash: hash_of(hash, parts) for hash in self._settings["hashes"]}
        raw = {"basename": name, "bytes": int(places[-1]), "hashes": hashes}
        return parts, {**self._settings, "samples": len(samples), "raw_data": raw, "zip_data": None}


class MdsFile:
    """An MDS file for reading, sample by sample; a `DamagedShard` names it.

    Size (in bytes), number of samples and columns (name and encoding, in the file's order) are as its index says.
    `page` are the bytes of a sample that are read at once; what lies behind them is read value by value.
    """

    def __init__(
        self, pread: Pread, size: int, name: str, num_samples: int, columns: Mapping[str, str], page: int = PAGE
    ) -> None:
        self._pread, self._size, self._name, self._num_samples, self._page = pread, size, name, num_samples, page
        self._columns = [(column, DECODERS[encoding]) for column, encoding in columns.items()]
        self._sizes = struct.Struct(f"<{len(columns)}I")
        self._places: tuple[int, ...] | None = None

    def check(self) -> None:
        """Read the places of all samples at once, and compare them with the index and the file."""
        count = self._num_samples
        header = self._pread(4 * (count + 2), 0)
        num_samples, *places = struct.unpack(f"<{count + 2}I", header) if len(header) == 4 * (count + 2) else (-1, 0)
        if num_samples != count or places[-1] != self._size or sorted(places) != places:
            raise DamagedShard(f"{self._name}: its header doesn't fit {count} samples in {self._size} bytes")
        self._places = tuple(places)

    def read(self, number: int, wanted: Mapping[str, int | None] | None = None) -> dict[str, Any]:
        """Return the columns of a sample, by its number from 0, decoded.

        `wanted` are columns to read and how many bytes of each, None for the whole value; None for all columns.
        """
        begin, end = self._place(number)
        pread, header = self._pread, self._sizes.size
        head = pread(min(self._page, end - begin), begin)
        sizes = self._sizes.unpack_from(head) if len(head) >= header else ()
        if header + sum(sizes) != end - begin or not sizes:
            raise self._damage(number, f"columns of {sum(sizes)} bytes in a sample of {end - begin}")
        starts, columns = accumulate(sizes, initial=header), {}
        for (name, decode), (start, stop) in zip(self._columns, pairwise(starts), strict=True):
            if wanted is not None:
                if name not in wanted:
                    continue
                limit = wanted[name]
                stop = stop if limit is None else min(stop, start + limit)
            value = head[start:stop] if stop <= len(head) else pread(stop - start, begin + start)
            if len(value) != stop - start:
                raise self._damage(number, f"{len(value)} bytes of a column of {stop - start}")
            try:
                columns[name] = decode(value)
            except (ValueError, RecursionError) as error:  # its message may quote the text
                found = f"sample {number} of it doesn't decode ({type(error).__name__})"
                raise DamagedShard(f"{self._name}: {found}") from None
        return columns

    def _place(self, number: int) -> tuple[int, int]:
        if self._places is not None:
            return self._places[number], self._places[number + 1]
        places = self._pread(8, 4 * (number + 1))
        begin, end = struct.unpack("<II", places) if len(places) == 8 else (0, 0)
        if not 0 <= number < self._num_samples or not begin < end <= self._size:
            raise self._damage(number, f"its place is {begin} to {end}, the file has {self._size} bytes")
        return begin, end

    def _damage(self, number: int, found: str) -> DamagedShard:
        text = f"sample {number} of it doesn't fit its shard: {found}; convert the data again"
        return DamagedShard(f"{self._name}: {text}")


def open_mds(file: io.IOBase, entry: Entry, page: int = PAGE) -> MdsFile:
    """Return the MDS file in an open file with its header checked; a compressed one is read whole."""
    source = _decompressed(file, entry) if entry.get("zip_data") else file

    def pread(size: int, place: int) -> bytes:
        source.seek(place)
        return source.read(size)

    size, columns = source.seek(0, io.SEEK_END), zip(entry["column_names"], entry["column_encodings"], strict=True)
    mds = MdsFile(pread, size, name_of(entry), entry["samples"], dict(columns), page)
    mds.check()
    return mds


def stored_info(entry: Entry) -> dict[str, Any]:
    """Return name, size and checksums of the file that is stored: the compressed one, where there is one."""
    return entry.get("zip_data") or entry["raw_data"]


def name_of(entry: Entry) -> str:
    """Return a shard's name in its index."""
    return str(entry["raw_data"]["basename"])


def leads_out(name: str) -> bool:
    """Whether a file's name in an index leads out of the set's folder, to anything else on this machine."""
    return name.startswith("/") or ".." in name.split("/")


def hash_of(name: str, parts: Iterable[bytes]) -> str:
    """Return a checksum, one of `HASHES`, of what the parts make together."""
    hash: Any = getattr(xxhash, name)() if name.startswith("xxh") else hashlib.new(name, usedforsecurity=False)
    for part in parts:
        hash.update(part)
    return hash.hexdigest()


def _decompressed(file: io.IOBase, entry: Entry) -> io.IOBase:
    from streaming.base.compression import decompress

    try:
        return io.BytesIO(decompress(entry["compression"], file.read()))
    except Exception as error:  # each compression has errors of its own
        raise DamagedShard(f"{name_of(entry)}: doesn't decompress ({type(error).__name__})") from None
