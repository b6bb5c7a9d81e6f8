"""Lengths of samples, counted while they are converted, so that their batches can be balanced without another pass.

What counts them is handed in; a file is the one that `composer-path lengths` writes, byte for byte. A part's counts
wait beside the set until `merge`, which knows the index that lengths belong to.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

import numpy as np

from composer_path.conversion.partition import Counts, PartitionDone
from composer_path.records.conversation import Conversation
from composer_path.shards.index import is_part_lengths, part_lengths_name
from composer_path.shards.lengths import DAMAGE, LengthsKey, SampleLengths, short_hash, write_lengths
from composer_path.storage.places import Bucket, Folder, open_place


@dataclass(frozen=True)
class WantedLengths:
    """Lengths as one training will look for them."""

    key: LengthsKey  # of no set yet
    measure: Callable[[Conversation], tuple[int, int, int]]  # tokens, answer tokens and images
    folder: str | None = None  # where they are to lie; None for beside the set


@dataclass(frozen=True)
class CountedLengths:
    """Lengths of a conversion's samples, partition by partition."""

    key: LengthsKey
    folder: str | None
    counts: dict[int, Counts]  # by the partition's number
    shards: dict[int, str]  # of each partition, hash of what it wrote

    def is_of(self, dones: Sequence[PartitionDone]) -> bool:
        """Whether these are the lengths of all samples of these partitions, as they were written."""
        return self.shards == {done.partition: _hash_of(done) for done in dones}

    def write(self, place: Folder | Bucket, index: bytes) -> str:
        """Write the set's file; returns where it lies."""
        rows = np.concatenate([np.zeros((0, 3), np.int32), *(self.counts[number] for number in sorted(self.counts))])
        lengths = SampleLengths(*(np.ascontiguousarray(column) for column in rows.T))
        where = place if self.folder is None else open_place(self.folder)
        return f"{where}/{write_lengths(where, self.key.of_set(index), lengths)}"

    def write_part(self, place: Folder | Bucket, part: int) -> None:
        """Write what a part has counted, for `merge`."""
        known = {"key": asdict(self.key), "folder": self.folder, "shards": self.shards}
        arrays = {str(number): counts for number, counts in self.counts.items()}
        file = io.BytesIO()
        np.savez_compressed(file, known=np.frombuffer(json.dumps(known).encode(), np.uint8), **arrays)
        what = short_hash(json.dumps([known["key"], self.folder]).encode())
        place.write(part_lengths_name(what, part), [file.getvalue()])


def counted(
    wanted: Sequence[WantedLengths], dones: Sequence[PartitionDone], counts: Sequence[Sequence[Counts]]
) -> list[CountedLengths]:
    """What was counted for each of those wanted; `counts` of each partition are in their order."""
    shards = {done.partition: _hash_of(done) for done in dones}
    columns = [[of_partition[number] for of_partition in counts] for number in range(len(wanted))]
    return [
        CountedLengths(one.key, one.folder, dict(zip(shards, column, strict=True)), shards)
        for one, column in zip(wanted, columns, strict=True)
    ]


def read_parts(place: Folder | Bucket) -> list[CountedLengths]:
    """What all parts have counted, joined for each training that was asked for; a damaged file counts as missing."""
    joined: dict[str, CountedLengths] = {}
    for name in filter(is_part_lengths, sorted(place.files())):
        with suppress(*DAMAGE), np.load(io.BytesIO(place.read(name)), allow_pickle=False) as arrays:
            known = json.loads(arrays["known"].tobytes())
            new = CountedLengths(LengthsKey(**known["key"]), known["folder"], {}, {})
            one = joined.setdefault(name.partition(".")[0], new)
            one.counts.update({int(number): arrays[number] for number in known["shards"]})
            one.shards.update({int(number): value for number, value in known["shards"].items()})
    return list(joined.values())


def _hash_of(done: PartitionDone) -> str:
    return short_hash(json.dumps(done.shards, sort_keys=True).encode())
