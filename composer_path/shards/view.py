"""A set of shards as it lies in a folder or a bucket: its index, its data card, and its samples one by one.

For looking at data, not for training: shards are read where they lie, one sample after the other.
"""

from __future__ import annotations

import io
import itertools
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from composer_path.parallel import in_processes
from composer_path.records.conversation import Conversation
from composer_path.shards.columns import COLUMNS, unpack_images
from composer_path.shards.index import CARD_NAME, INDEX_NAME
from composer_path.shards.mds import (
    PAGE,
    DamagedShard,
    Entry,
    MdsFile,
    ShardError,
    leads_out,
    name_of,
    open_mds,
    stored_info,
)
from composer_path.storage.errors import StorageError
from composer_path.storage.places import Bucket, open_place

Result = TypeVar("Result")
OF_IMAGES = ("features", "scale_levels")  # what an index says of its images, and what is made of the set says too
_WHOLE = 2**32  # bytes: more than a sample can have


@dataclass(frozen=True)
class StoredSample:
    """One sample of a shard, decoded."""

    position: int  # in the set, from 0
    shard: str  # its name in the index
    id: str  # as stored: a keyed hash unless ids were kept
    conversation: Conversation
    images: tuple[bytes, ...]  # the stored files, or finished squares
    metadata: Mapping[str, Any]

    @property
    def source(self) -> str:
        """The data set that the record says it comes from, "" if it doesn't."""
        return str(self.metadata.get("source") or "")


class ShardView:
    """The set of shards at a folder or an address (`s3://bucket/folder`).

    All that reads raises a `ShardError` if something isn't there or can't be read, a `DamagedShard` if a shard isn't
    what the index says.
    """

    def __init__(self, url: str | Path) -> None:
        self.place = open_place(url)
        index = self._read_json(INDEX_NAME)
        if index is None:
            raise ShardError(
                f"{self.place}: must hold {INDEX_NAME}, found none; finish the set with composer-path convert "
                "--resume, or name another place"
            )
        shards = index.get("shards") if isinstance(index, dict) and index.get("version") == 2 else None
        if not isinstance(shards, list) or not all(map(_is_our_shard, shards)):
            raise ShardError(
                f"{self.place}: {INDEX_NAME} must list MDS shards with the columns {', '.join(COLUMNS)}, found another "
                "content; write shards with composer-path convert"
            )
        self.shards: list[Entry] = shards
        self.index_keys = {key: index[key] for key in OF_IMAGES if key in index}
        self.features: dict[str, Any] | None = index.get("features")  # None for a set of images
        card = self._read_json(CARD_NAME)
        self.card: dict[str, Any] = card if isinstance(card, dict) else {}
        # Position of each shard's first sample; one more at the end, the number of samples.
        self.starts = [0, *itertools.accumulate(shard["samples"] for shard in shards)]

    def __len__(self) -> int:
        """Number of samples, as the index says."""
        return self.starts[-1]

    def records(self, number: int, wanted: Iterable[int] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield position and decoded columns of a shard's samples, in order: of all, or at positions in the set."""
        start = self.starts[number]
        positions = range(start, self.starts[number + 1]) if wanted is None else wanted
        with self._open_shard(number, _WHOLE) as file:
            for position in positions:
                yield position, file.read(position - start)

    def texts(self, number: int) -> Iterator[tuple[Any, int]]:
        """Yield the conversation column and the number of images of a shard's samples; images are passed over."""
        with self._open_shard(number, PAGE) as file:
            for index in range(self.shards[number]["samples"]):
                columns = file.read(index, {"conversation": None, "images": 4})
                yield columns["conversation"], int.from_bytes(columns["images"], "little")

    def samples(self, number: int) -> Iterator[StoredSample]:
        """Yield a shard's samples, in order."""
        name = name_of(self.shards[number])
        return (to_sample(position, name, columns) for position, columns in self.records(number))

    def sample(self, position: int) -> StoredSample:
        """Read the sample at a position, from 0; of a bucket's shard only this part is fetched."""
        if not 0 <= position < len(self):
            raise ShardError(f"{self.place}: positions go from 0 to {len(self) - 1}, found {position}")
        number = self.shard_of(position)
        ((_, columns),) = self.records(number, [position])
        return to_sample(position, name_of(self.shards[number]), columns)

    def shard_of(self, position: int) -> int:
        """Return the number of the shard that holds a position."""
        return bisect_right(self.starts, position) - 1

    def find(self, record_id: str) -> StoredSample:
        """Read the first sample with this id as it is stored; all shards may have to be read."""
        for number, shard in enumerate(self.shards):
            for position, columns in self.records(number):
                if columns["id"] == record_id:
                    return to_sample(position, name_of(shard), columns)
        hashed = " (ids are stored as keyed hashes)" if self.card.get("options", {}).get("ids") == "hash" else ""
        raise ShardError(f"{self.place}: no sample has this id{hashed}")

    @contextmanager
    def open_file(self, name: str) -> Iterator[io.IOBase]:
        """Open a file of the set for reading."""
        place = self.place
        with (
            self._explained(name),
            place.open(name) if isinstance(place, Bucket) else open(place.path / name, "rb") as file,
        ):
            yield file

    @contextmanager
    def _open_shard(self, number: int, page: int) -> Iterator[MdsFile]:
        shard = self.shards[number]
        with self.open_file(stored_info(shard)["basename"]) as file:
            yield open_mds(file, shard, page)

    def _read_json(self, name: str) -> Any:
        """A JSON file's content, or None if there is no such file."""
        with self._explained(name):
            try:
                return json.loads(self.place.read(name))
            except (FileNotFoundError, NotADirectoryError):
                return None
            except ValueError:
                raise ShardError(f"{self.place}: {name} must be JSON, found a damaged file") from None

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Name the file in what a place raises."""
        try:
            yield
        except FileNotFoundError:
            raise ShardError(f"{self.place}: {name}: there is no such file") from None
        except StorageError as error:
            raise ShardError(str(error)) from None
        except OSError as error:
            raise ShardError(f"{self.place}: {name}: {error.strerror or type(error).__name__}") from None


def over_shards(
    function: Callable[[tuple[ShardView, int, Any]], Result],
    view: ShardView,
    given: Any,
    workers: int,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Result]:
    """Call a function with (view, number of a shard, what is given) for all shards, in processes; results in order.

    `progress` is called with the number of shards after each.
    """
    tasks = [(view, number, given) for number in range(len(view.shards))]
    for number, result in enumerate(in_processes(function, tasks, workers, fork=True), start=1):
        yield result
        if progress is not None:
            progress(number)


def to_sample(position: int, shard: str, columns: Mapping[str, Any]) -> StoredSample:
    """Make a sample of a shard's decoded columns, if they are what a conversion writes (else a `DamagedShard`)."""
    try:
        images = unpack_images(columns["images"])
        conversation = Conversation.from_shard(columns["conversation"], len(images))
        metadata = dict(columns["metadata"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found = str(error) if type(error) is ValueError else f"another structure ({type(error).__name__})"
        raise DamagedShard(f"{shard}: sample {position}: {found}") from None
    return StoredSample(position, shard, str(columns["id"]), conversation, tuple(images), metadata)


def _is_our_shard(shard: Any) -> bool:
    try:
        columns = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
        inside = not any(map(leads_out, (stored_info(shard)["basename"], name_of(shard))))
        return shard["format"] == "mds" and columns == COLUMNS and isinstance(shard["samples"], int) and inside
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
