"""What comes more than once among all records, found without holding all of them in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from composer_path.census.tally import SEEN
from composer_path.conversion.spill import SpilledRows

_NUM_LISTED = 10


@dataclass(frozen=True)
class Repeated:
    """One thing that comes several times."""

    times: int
    size: int  # of it, in characters or bytes
    first: int  # position of the first record that has it


@dataclass(frozen=True)
class Repetition:
    """How often things of one kind repeat."""

    num_repeated: int  # those that equal an earlier one
    most: tuple[Repeated, ...]  # the most frequent, first


class Seen:
    """Things of one kind, by their hashes."""

    def __init__(self) -> None:
        self._rows = SpilledRows()

    def add(self, things: Iterable[tuple[int, int, int]]) -> None:
        """Note hash, position and size of some."""
        for row in np.array(list(things), SEEN):
            self._rows.add(int(row["hash"]), row.tobytes())

    def repetition(self) -> Repetition:
        """Count those that come again, and give the memory back."""
        num_repeated, most = 0, list[Repeated]()
        for group in self._rows.groups():
            rows = np.frombuffer(group, SEEN)
            _, index, counts = np.unique(rows["hash"], return_inverse=True, return_counts=True)
            num_repeated += len(rows) - len(counts)
            for which in np.flatnonzero(counts > 1):
                same = rows[index == which]
                most.append(Repeated(len(same), int(same["size"][0]), int(same["position"].min())))
            most = sorted(most, key=lambda one: (-one.times, one.first))[:_NUM_LISTED]
        self._rows.close()
        return Repetition(num_repeated, tuple(most))
