"""First reading of the input: how many records, which ids come twice, and where to cut the file into partitions.

Only what a record says is looked at, no image. Memory doesn't grow with the number of records: ids go through
temporary files as hashes, and the file's places are kept for every few hundredth record.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from composer_path.conversion.input_file import InputFile
from composer_path.conversion.record_file import RawRecord, place_of
from composer_path.conversion.spill import SpilledRows
from composer_path.layouts.reading import DEFAULT, Reading
from composer_path.records.conversation import id_of
from composer_path.records.rules import RecordError
from composer_path.shards.index import part_name

# Records of a partition: enough for whole shards, few enough that a killed run loses little and many processes have
# work. With images (0.1 to 1 MB each) 256 records already make shards of good size.
MAX_PARTITION_SIZE = 8192
_MIN_PARTITION_SIZE = 256
_NUM_PARTITIONS = 32

_ID_ROW = struct.Struct("<QQqq")
_ID_DTYPE = np.dtype([("high", "<u8"), ("low", "<u8"), ("position", "<i8"), ("line", "<i8")])


@dataclass(frozen=True)
class Partition:
    """Consecutive records of the input, from one place of it to another, that one process converts."""

    index: int  # from 0
    start: int  # a byte or a row, see `input_file`
    end: int
    first_position: int
    first_line: int | None  # None for a list
    num_records: int  # good and bad
    duplicates: dict[int, str] = field(default_factory=dict)  # position -> place of the earlier one with the same id

    @property
    def name(self) -> str:
        """Its folder's name in the data set."""
        return part_name(self.index)


class InputScan:
    """What the first reading found; `problem` is what is wrong with the file as a whole, if anything is."""

    def __init__(
        self,
        data: str | Path,
        partition_size: int | None = None,
        report: Callable[[int], None] = lambda count: None,
        reading: Reading = DEFAULT,
    ) -> None:
        self.num_records = self.num_bytes = self._num_with_images = 0
        self.problem: RecordError | None = None
        grain = partition_size or _MIN_PARTITION_SIZE
        hash = _CountingHash()
        marks: list[tuple[int, int | None]] = []  # where each `grain` records begin
        ids, end = SpilledRows(), 0
        for record in InputFile(str(data), reading).records(hash):
            if record.position is None:
                self.problem = record.value
                return
            if record.position % grain == 0:
                marks.append((record.start, record.line))
            self.num_records += 1
            self._num_with_images += isinstance(record.value, dict) and record.value.get("image") is not None
            _note_id(ids, record)
            end = record.end
            report(self.num_records)
        self.sha256, self.num_bytes = hash.sha256.hexdigest(), hash.num_bytes
        self.partition_size = partition_size or self._good_partition_size()
        self._end = end
        self._marks = marks[:: self.partition_size // grain]
        self._duplicates = _find_duplicates(ids)
        ids.close()

    @property
    def num_partitions(self) -> int:
        """Number of partitions."""
        return len(self._marks)

    def partitions(self) -> Iterator[Partition]:
        """Yield the partitions in order."""
        for index, (start, line) in enumerate(self._marks):
            first = index * self.partition_size
            last = min(first + self.partition_size, self.num_records)
            end = self._marks[index + 1][0] if index + 1 < self.num_partitions else self._end
            rows = slice(*np.searchsorted(self._duplicates["position"], [first, last]))
            duplicates = {
                int(row["position"]): place_of(int(row["first"]), int(row["line"]) if row["line"] >= 0 else None)
                for row in self._duplicates[rows]
            }
            yield Partition(index, start, end, first, line, last - first, duplicates)

    def _good_partition_size(self) -> int:
        if not self._num_with_images:
            return MAX_PARTITION_SIZE
        wanted = -(-self.num_records // _NUM_PARTITIONS)
        wanted = -(-wanted // _MIN_PARTITION_SIZE) * _MIN_PARTITION_SIZE
        return min(MAX_PARTITION_SIZE, max(_MIN_PARTITION_SIZE, wanted))


class _CountingHash:
    """Hash and length of what goes through."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0

    def update(self, data: bytes) -> None:
        self.sha256.update(data)
        self.num_bytes += len(data)


def _note_id(ids: SpilledRows, record: RawRecord) -> None:
    record_id = id_of(record.value)
    if record_id is not None and record.position is not None:
        # 128 bits: a false duplicate among 10^9 ids has a chance of 10^-21. A lone surrogate has no UTF-8.
        digest = xxhash.xxh3_128_intdigest(record_id.encode("utf-8", "surrogatepass"))
        high, low = digest >> 64, digest & (2**64 - 1)
        line = -1 if record.line is None else record.line
        ids.add(low, _ID_ROW.pack(high, low, record.position, line))


def _find_duplicates(ids: SpilledRows) -> np.ndarray:
    """Return position of each record with an earlier one's id, and position and line of that one, by position."""
    dtype = np.dtype([("position", "<i8"), ("first", "<i8"), ("line", "<i8")])
    found = [np.empty(0, dtype)]
    for group in ids.groups():
        rows = np.frombuffer(group, _ID_DTYPE)
        rows = rows[np.lexsort((rows["position"], rows["low"], rows["high"]))]
        new = np.ones(len(rows), bool)
        new[1:] = (rows["high"][1:] != rows["high"][:-1]) | (rows["low"][1:] != rows["low"][:-1])
        if new.all():
            continue
        first = rows[np.maximum.accumulate(np.where(new, np.arange(len(rows)), 0))]
        duplicates = np.empty(int((~new).sum()), dtype)
        duplicates["position"] = rows["position"][~new]
        duplicates["first"], duplicates["line"] = first["position"][~new], first["line"][~new]
        found.append(duplicates)
    return np.sort(np.concatenate(found), order="position")
