"""What was wrong with the records of one input file: counted, shown, and listed in `rejected.jsonl`.

Why a record is refused stands in `records/rules.py`: each rule with what it asks for.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import IO

from composer_path.conversion.record_file import RawRecord
from composer_path.records.rules import RecordError
from composer_path.storage.atomic import write_whole

# What a person reads in a terminal; the counts by rule below them are of all problems.
_NUM_SHOWN = 20
# Kept for programs that ask. All of them may be millions.
_NUM_KEPT = 1000


class ConvertError(ValueError):
    """The input can't be converted; lists the problems (`rejections`, if records are at fault), without text or ids."""

    def __init__(self, message: str, rejections: Rejections | None = None) -> None:
        super().__init__(message)
        self.rejections = rejections


def explained(error: Exception, place: str) -> str:
    """Word an error for people: the system's own say only "No space left on device", perhaps without a file."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    where = error.filename if error.filename is not None else place
    return f"{where}: {error.strerror}; nothing was published. Look for space and rights there"


class Rejections:
    """The problems of the input file of a name, in its order; `file`, if one is wanted, lists all of them with ids."""

    def __init__(self, name: str, file: Path | None = None) -> None:
        self.name, self.file = name, file
        # Place, id and error of the first thousand; a record may have several.
        self.problems: list[tuple[RawRecord, str | None, RecordError]] = []
        self.num_problems = 0
        self._by_rule: Counter[str] = Counter()
        self._num_records = 0
        self._last: tuple[int | None, set[str]] | None = None
        self._listing: IO[str] | None = None

    def add(self, record: RawRecord, record_id: str | None, error: RecordError) -> None:
        """Note one problem of a record, all those of one record after each other; its content isn't kept."""
        place = record.without_value()
        error = error.at(record.where)
        if self._last is None or self._last[0] != record.position:
            self._last = (record.position, set())
            self._num_records += 1
        if error.rule not in self._last[1]:
            self._last[1].add(error.rule)
            self._by_rule[error.rule] += 1
        self.num_problems += 1
        if len(self.problems) < _NUM_KEPT:
            self.problems.append((place, record_id, error))
        if self.file is not None:
            self._list(place, record_id, error)

    def by_rule(self) -> dict[str, int]:
        """Return how many records break each rule, most frequent first."""
        return dict(self._by_rule.most_common())

    def __len__(self) -> int:
        """Number of rejected records."""
        return self._num_records

    def __str__(self) -> str:
        """The first problems line by line, then the count of each rule. Holds no ids."""
        lines = [f"{self.name}: {len(self)} rejected (records are counted from 0)"]
        lines += [f"  {error}" for _, _, error in self.problems[:_NUM_SHOWN]]
        if self.num_problems > _NUM_SHOWN:
            lines.append(f"  and {self.num_problems - _NUM_SHOWN} problems more")
        counts = ", ".join(f"{rule} {count}" for rule, count in self.by_rule().items())
        return "\n".join([*lines, f"rejected by rule: {counts}"])

    def save(self) -> None:
        """Write the list, readable by its owner only, if there is anything in it."""
        listing = self._listing
        if listing is not None and self.file is not None:
            listing.seek(0)
            write_whole(self.file, lambda file: file.writelines(line.encode() for line in listing), mode=0o600)
            listing.close()

    def check_file(self, protected: Collection[str | Path], out: str | None) -> None:
        """Raise `ConvertError` if the list would overwrite something else, or lie in the set's folder `out`."""
        if self.file is None:
            return
        where = f"--rejected {self.file}: must name a new file, or an earlier list"
        real, fix = Path(os.path.realpath(self.file)), "; give another name with --rejected"
        if out is not None and real.is_relative_to(os.path.realpath(out)):
            raise ConvertError(f"{where}, outside of --out; found a place in {out}{fix}")
        if "://" in os.fspath(self.file) or ":/" in os.fspath(self.file):
            raise ConvertError(f"{where}, found an address{fix}")
        if real.is_dir():
            raise ConvertError(f"{where}, found a folder{fix}")
        if any(os.path.realpath(path) == str(real) for path in protected):
            raise ConvertError(f"{where}, found a file that this conversion reads{fix}")
        if real.is_file() and not _is_list(real):
            raise ConvertError(f"{where}, found another file, which would be lost{fix}")

    def _list(self, record: RawRecord, record_id: str | None, error: RecordError) -> None:
        row = {"data": self.name, "record": record.position, "line": record.line, "id": record_id}
        row |= {"where": error.where, "rule": error.rule, "found": error.found, "fix": error.fix}
        if self._listing is None:  # of no name, so that nothing stays behind a killed process
            self._listing = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._listing.write(json.dumps(row) + "\n")


def _is_list(path: Path) -> bool:
    """Whether a file is a list of rejected records, or empty."""
    with open(path, "rb") as file:
        line = file.readline(1 << 16)
    try:
        row = json.loads(line or b"{}")
    except ValueError:
        return False
    return not line or (isinstance(row, dict) and {"data", "record", "rule", "fix"} <= row.keys())
