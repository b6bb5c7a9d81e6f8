"""A set of shards as it lies in a folder or a bucket: its index, its data card, and its samples one by one.

For looking at data, not for training: shards are read where they lie, one sample after the other.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from composer_path.conversion.destination import CARD_NAME, INDEX_NAME
from composer_path.records.conversation import Conversation
from composer_path.shards.columns import COLUMNS, unpack_images
from composer_path.storage.places import Bucket, StorageError, open_place

_DECODERS: dict[str, Callable[[bytes], Any]] = {"bytes": bytes, "json": json.loads, "str": bytes.decode}

Item = TypeVar("Item")
Result = TypeVar("Result")


class ShardViewError(ValueError):
    """A set that can't be opened, or a file of it that can't be read; never holds text, names or credentials."""


class DamagedShard(ShardViewError):
    """A shard whose bytes aren't what its index says."""


@dataclass(frozen=True)
class StoredSample:
    """One sample of a shard, decoded.

    Attributes:
        position: its number in the set, from 0.
        shard: its shard's name in the index.
        id: as stored: a keyed hash unless ids were kept.
        conversation: turns and system message.
        images: the stored files, or finished squares.
        metadata: as stored.
    """

    position: int
    shard: str
    id: str
    conversation: Conversation
    images: tuple[bytes, ...]
    metadata: Mapping[str, Any]

    @property
    def source(self) -> str:
        """The data set that the record says it comes from, "" if it doesn't."""
        return str(self.metadata.get("source") or "")


class ShardView:
    """A set of shards.

    Args:
        url: folder or address (``s3://bucket/folder``) of ``index.json``.

    Attributes:
        place: where it lies.
        shards: the index's entries, in order.
        card: what ``dataset.json`` holds; empty if there is none.
        features: what the index says of stored features; None for a set of images.
        starts: position of each shard's first sample; one more at the end, the number of samples.

    Raises:
        ShardViewError: there is no index, or it isn't one of shards that convert.py wrote.
    """

    def __init__(self, url: str | Path) -> None:
        self.place = open_place(url)
        index = self._read_json(INDEX_NAME)
        if index is None:
            raise ShardViewError(
                f"{self.place}: must hold {INDEX_NAME}, found none; finish the set with convert.py --resume, or name "
                "another place"
            )
        shards = index.get("shards") if isinstance(index, dict) and index.get("version") == 2 else None
        if not isinstance(shards, list) or not all(map(_is_our_shard, shards)):
            raise ShardViewError(
                f"{self.place}: {INDEX_NAME} must list MDS shards with the columns {', '.join(COLUMNS)}, found another "
                "content; write shards with data_prep/convert.py"
            )
        self.shards: list[dict[str, Any]] = shards
        self.features: dict[str, Any] | None = index.get("features")
        card = self._read_json(CARD_NAME)
        self.card: dict[str, Any] = card if isinstance(card, dict) else {}
        self.starts = [0]
        for shard in shards:
            self.starts.append(self.starts[-1] + shard["samples"])

    def __len__(self) -> int:
        """Number of samples, as the index says."""
        return self.starts[-1]

    def records(self, number: int, wanted: Iterable[int] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield position and decoded columns of a shard's samples, in order.

        Args:
            number: the shard's, from 0.
            wanted: positions in the set, all of this shard; None for all of them.

        Raises:
            ShardViewError: the shard can't be read.
            DamagedShard: it isn't what the index says.
        """
        start = self.starts[number]
        positions = range(start, self.starts[number + 1]) if wanted is None else list(wanted)
        with self._open_shard(number) as file:
            numbers = (position - start for position in positions)
            yield from zip(positions, read_shard(file, self.shards[number], numbers), strict=True)

    def samples(self, number: int) -> Iterator[StoredSample]:
        """Yield a shard's samples, in order; raises as ``records``."""
        name = name_of(self.shards[number])
        return (to_sample(position, name, columns) for position, columns in self.records(number))

    def sample(self, position: int) -> StoredSample:
        """Read the sample at a position, from 0; of a bucket's shard only this part is fetched.

        Raises:
            ShardViewError: there is none, or it can't be read.
        """
        if not 0 <= position < len(self):
            raise ShardViewError(f"{self.place}: positions go from 0 to {len(self) - 1}, found {position}")
        number = self.shard_of(position)
        ((_, columns),) = self.records(number, [position])
        return to_sample(position, name_of(self.shards[number]), columns)

    def shard_of(self, position: int) -> int:
        """Return the number of the shard that holds a position."""
        return bisect_right(self.starts, position) - 1

    def find(self, record_id: str) -> StoredSample:
        """Read the first sample with this id as it is stored; all shards may have to be read.

        Raises:
            ShardViewError: no sample has it.
        """
        for number, shard in enumerate(self.shards):
            for position, columns in self.records(number):
                if columns["id"] == record_id:
                    return to_sample(position, name_of(shard), columns)
        hashed = " (ids are stored as keyed hashes)" if self.card.get("options", {}).get("ids") == "hash" else ""
        raise ShardViewError(f"{self.place}: no sample has this id{hashed}")

    @contextmanager
    def open_file(self, name: str) -> Iterator[io.IOBase]:
        """Open a file of the set for reading.

        Raises:
            ShardViewError: it isn't there, or can't be read.
        """
        try:
            if isinstance(self.place, Bucket):
                with self.place.open(name) as file:
                    yield file
            else:
                with open(self.place.path / name, "rb") as file:
                    yield file
        except FileNotFoundError:
            raise ShardViewError(f"{self.place}: {name}: there is no such file") from None
        except StorageError as error:
            raise ShardViewError(str(error)) from None
        except OSError as error:
            raise ShardViewError(f"{self.place}: {name}: {error.strerror or type(error).__name__}") from None

    @contextmanager
    def _open_shard(self, number: int) -> Iterator[io.IOBase]:
        """Open a shard's raw data."""
        shard = self.shards[number]
        with self.open_file(stored_info(shard)["basename"]) as file:
            yield decompressed(file, shard) if shard.get("zip_data") else file

    def _read_json(self, name: str) -> Any:
        """A JSON file's content, or None if there is no such file."""
        try:
            return json.loads(self.place.read(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except StorageError as error:
            raise ShardViewError(str(error)) from None
        except OSError as error:
            raise ShardViewError(f"{self.place}: {name}: {error.strerror or type(error).__name__}") from None
        except ValueError:
            raise ShardViewError(f"{self.place}: {name} must be JSON, found a damaged file") from None


def to_sample(position: int, shard: str, columns: Mapping[str, Any]) -> StoredSample:
    """Make a sample of a shard's decoded columns.

    Raises:
        DamagedShard: they aren't what convert.py writes.
    """
    try:
        images = unpack_images(columns["images"])
        conversation = Conversation.from_shard(columns["conversation"], len(images))
        metadata = dict(columns["metadata"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found = str(error) if type(error) is ValueError else f"another structure ({type(error).__name__})"
        raise DamagedShard(f"{shard}: sample {position}: {found}") from None
    return StoredSample(position, shard, str(columns["id"]), conversation, tuple(images), metadata)


def read_shard(file: io.IOBase, shard: Mapping[str, Any], numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Yield the decoded columns of samples of a shard.

    An MDS file is the number of samples and the place of each and of the end (uint32, little endian), the column
    names as JSON, then the samples; a sample is the size of each column's value (uint32), then the values. Streaming's
    reader takes seconds to import, and opens the file anew for each sample.

    Args:
        file: the shard's raw data.
        shard: its entry of the index.
        numbers: samples to read, from 0.

    Raises:
        DamagedShard: the file isn't what the index says.
    """
    name, count = name_of(shard), shard["samples"]
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    header = file.read(4 * (count + 2))
    num_samples, *places = struct.unpack(f"<{count + 2}I", header) if len(header) == 4 * (count + 2) else (0, 0)
    if num_samples != count or places[-1] != size or sorted(places) != places:
        raise DamagedShard(f"{name}: its header doesn't fit {count} samples in {size} bytes")
    for number in numbers:
        file.seek(places[number])
        data = file.read(places[number + 1] - places[number])
        try:
            columns = _decode(data, shard["column_names"])
        except (ValueError, struct.error, RecursionError) as error:  # its message may quote the text
            raise DamagedShard(f"{name}: sample {number} of it doesn't decode ({type(error).__name__})") from None
        yield columns


def _decode(data: bytes, names: Sequence[str]) -> dict[str, Any]:
    sizes = struct.unpack_from(f"<{len(names)}I", data)
    place = 4 * len(names)
    if place + sum(sizes) != len(data):
        raise ValueError
    columns = {}
    for name, size in zip(names, sizes, strict=True):
        columns[name] = _DECODERS[COLUMNS[name]](data[place : place + size])
        place += size
    return columns


def in_processes(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Map in several processes, in order; in this one if `workers` is 1."""
    global _forked
    items = list(items)
    workers = min(workers, len(items))
    if workers <= 1:
        yield from map(function, items)
        return
    # Forked: imports take seconds in a process that starts afresh, and an index of many shards would be sent with each
    # task. No thread has been started here yet.
    _forked = function, items
    try:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
            yield from pool.map(_run_forked, range(len(items)))
    finally:
        _forked = None


# What a forked process finds in its memory: the function and all items.
_forked: tuple[Callable[[Any], Any], list[Any]] | None = None


def _run_forked(number: int) -> Any:
    assert _forked is not None
    function, items = _forked
    return function(items[number])


def stored_info(shard: Mapping[str, Any]) -> dict[str, Any]:
    """Return name, size and checksums of the file that is stored: the compressed one, where there is one."""
    return shard.get("zip_data") or shard["raw_data"]


def name_of(shard: Mapping[str, Any]) -> str:
    """Return a shard's name in its index."""
    return str(shard["raw_data"]["basename"])


def decompressed(file: io.IOBase, shard: Mapping[str, Any]) -> io.IOBase:
    """Return the raw data of a compressed shard.

    Raises:
        DamagedShard: it doesn't decompress.
    """
    from streaming.base.compression import decompress

    try:
        return io.BytesIO(decompress(shard["compression"], file.read()))
    except Exception as error:  # each compression has errors of its own
        raise DamagedShard(f"{name_of(shard)}: doesn't decompress ({type(error).__name__})") from None


def _is_our_shard(shard: Any) -> bool:
    try:
        columns = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
        # A name that leads out of the set's folder could make us read anything on this machine.
        inside = all(not name.startswith("/") and ".." not in name.split("/") for name in _names(shard))
        return shard["format"] == "mds" and columns == COLUMNS and isinstance(shard["samples"], int) and inside
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def _names(shard: dict[str, Any]) -> list[str]:
    return [stored_info(shard)["basename"], shard["raw_data"]["basename"]]
