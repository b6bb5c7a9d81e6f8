"""What was wrong with the records of one input file: collected, counted, shown and written down."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from composer_path.data.conversation import RecordError
from composer_path.data.record_file import RawRecord

# What a person reads in a terminal; the counts by rule below them are of all problems.
_NUM_SHOWN = 20


class ConvertError(ValueError):
    """The input can't be converted; the message lists the problems, without any text, name or id.

    Attributes:
        rejections: the problems, when records were at fault.
    """

    def __init__(self, message: str, rejections: Rejections | None = None) -> None:
        super().__init__(message)
        self.rejections = rejections


class Rejections:
    """The problems of one input file, in the file's order.

    Attributes:
        problems: (place, id or None, error) of every problem; a record may have several.
    """

    def __init__(self, data: Path) -> None:
        self.data = data
        self.problems: list[tuple[RawRecord, str | None, RecordError]] = []
        self.positions: set[int | None] = set()

    def add(self, record: RawRecord, record_id: str | None, error: RecordError) -> None:
        """Note one problem of a record; the record's content isn't kept."""
        place = RawRecord(record.position, record.line, None)
        self.problems.append((place, record_id, error.at(record.where)))
        self.positions.add(record.position)

    def by_rule(self) -> dict[str, int]:
        """Return how many records break each rule, most frequent first."""
        broken = {(error.rule, record.position): None for record, _, error in self.problems}
        return dict(Counter(rule for rule, _ in broken).most_common())

    def __len__(self) -> int:
        """Number of rejected records."""
        return len(self.positions)

    def __str__(self) -> str:
        """The first problems line by line, then the count of each rule. Holds no ids."""
        lines = [f"{self.data.name}: {len(self)} rejected (records are counted from 0)"]
        lines += [f"  {error}" for _, _, error in self.problems[:_NUM_SHOWN]]
        if len(self.problems) > _NUM_SHOWN:
            lines.append(f"  and {len(self.problems) - _NUM_SHOWN} problems more")
        counts = ", ".join(f"{rule} {count}" for rule, count in self.by_rule().items())
        return "\n".join([*lines, f"rejected by rule: {counts}"])

    def save(self, path: Path) -> None:
        """Write one JSON line for each problem, with the record's id, so readable by its owner only."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            for record, record_id, error in self.problems:
                row = {
                    "data": self.data.name,
                    "record": record.position,
                    "line": record.line,
                    "id": record_id,
                }
                row |= {"where": error.where, "rule": error.rule, "found": error.found, "fix": error.fix}
                file.write(json.dumps(row) + "\n")
