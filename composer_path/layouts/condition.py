"""Which rows are taken: `--where COLUMN=VALUE` of the row itself, or `FILE.csv:COLUMN=VALUE` of a table beside it.

A table beside it is joined by the pictures' file names, without folders. A row that it doesn't name, or gives no value,
is left out and counted: nothing is known of it. Nothing is evaluated; a condition is a column, a sign and values.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Bool, UInt64

from composer_path.layouts.row import IMAGE_KEYS, Row, number_of, plain_key
from composer_path.layouts.table import Table, TableError

_CONDITION = re.compile(r"(?:(.+?\.(?:csv|tsv)):)?([^:=!<>]+?)\s*(!=|<=|>=|=|<|>)([^=].*|)", re.DOTALL | re.IGNORECASE)
_ORDERS: dict[str, Any] = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_TRUTH = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}


class ConditionError(ValueError):
    """A condition can't be understood, or its table doesn't have what it asks for."""


@dataclass(frozen=True)
class Condition:
    """`column=value`, `!=`, or an order of numbers; `=` and `!=` take several values with `|` between them."""

    table: str | None
    column: str
    sign: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read a condition; an error never repeats a value."""
        match = _CONDITION.fullmatch(text.strip())
        if match is None or not match[4].strip():
            fix = "write subset=openpath, 'height>=448' or predictions.csv:any_impairment=0"
            raise ConditionError(f"--where: must be [TABLE.csv:]COLUMN, a sign (= != < <= > >=) and a value; {fix}")
        table, column, sign, value = match.groups()
        values = (value.strip(),) if sign in _ORDERS else tuple(part.strip() for part in value.split("|"))
        if sign in _ORDERS and _number(values[0]) is None:
            raise ConditionError(f"--where {column}{sign}: must be followed by a number, found something else")
        return cls(table, column.strip(), sign, values)

    def why_left_out(self, row: Row, images: Any) -> str | None:
        """Say why a row isn't taken, without its values; None if it is."""
        if self.table is None:
            value = row.get(self.column)
            if value is None:
                return f"--where {self.column}: no value"
            return None if self.holds(value) else f"--where {self.column}"
        names = [one for one in (images if isinstance(images, list) else [images]) if isinstance(one, str)]
        found = [_joined(self, _stamp(self.table)).verdict(name) for name in names]
        if not found or None in found:
            return f"--where {self.column}: not in the table"
        return None if all(found) else f"--where {self.column}"

    def holds(self, value: Any) -> bool:
        """Whether a value is as the condition says."""
        if self.sign in _ORDERS:
            number, limit = _number(value), _number(self.values[0])
            return number is not None and limit is not None and bool(_ORDERS[self.sign](number, limit))
        return any(_equal(value, one) for one in self.values) == (self.sign == "=")

    def fingerprint(self) -> list[Any]:
        """Return what of it shapes a set; of a table it is the verdicts."""
        hash = None if self.table is None else _joined(self, _stamp(self.table)).hash()
        return [self.column, self.sign, list(self.values), hash]


class _Joined:
    """A condition's verdict on each picture that a table names, in 9 bytes a name."""

    def __init__(self, names: UInt64[np.ndarray, " n"], fits: Bool[np.ndarray, " n"]) -> None:
        self._names, self._fits = names, fits

    def verdict(self, name: str) -> bool | None:
        """Whether the condition holds for a picture; None if the table doesn't say."""
        hash = np.uint64(_hash(name))
        index = int(np.searchsorted(self._names, hash))
        if index == len(self._names) or self._names[index] != hash:
            return None
        return bool(self._fits[index])

    def hash(self) -> str:
        return xxhash.xxh64_hexdigest(self._names.tobytes() + self._fits.tobytes())


@lru_cache(maxsize=8)
def _joined(condition: Condition, stamp: tuple[int, int]) -> _Joined:
    """Read a condition's table, once in each process while the file stays as it is."""
    path = condition.table
    assert path is not None
    where = f"--where {os.path.basename(path)}"
    try:
        with open(path, "rb") as file:
            table = Table(file, path)
            keys = {plain_key(name): name for name in table.columns if name}
            named = sorted({keys[plain_key(key)] for key in IMAGE_KEYS if plain_key(key) in keys})
            column = keys.get(plain_key(condition.column))
            if column is None:
                found = f"none among its {len(table.columns)}"
                raise ConditionError(f"{where}: must have the column {condition.column!r}, found {found}")
            if len(named) != 1:
                raise ConditionError(f"{where}: must name pictures in one column (Filename), found {len(named)}")
            rows = list(_verdicts(condition, table, named[0], column, where))
    except OSError as error:
        raise ConditionError(f"{where}: must be a table that can be read, found {error.strerror}") from None
    except TableError as error:
        raise ConditionError(f"{where}: {error.problem}") from None
    names = np.array([name for name, _ in rows], np.uint64)
    fits = np.array([fit for _, fit in rows], bool)
    names, first, counts = np.unique(names, return_index=True, return_counts=True)
    if (counts > 1).any():
        truths = dict(rows)
        if any(truths[name] != fit for name, fit in rows):
            raise ConditionError(f"{where}: a picture must have one line, found several that differ; correct the table")
    return _Joined(names, fits[first])


def _verdicts(condition: Condition, table: Table, name: str, column: str, where: str) -> Iterator[tuple[int, bool]]:
    for line in table.rows():
        if line.problem is not None:
            raise ConditionError(f"{where}: line {line.line}: {line.problem}")
        values: Mapping[str, Any] = line.values
        if values[name] is not None and values[column] is not None:
            yield _hash(values[name]), condition.holds(values[column])


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        found = error.strerror or "a read error"
        raise ConditionError(f"--where {os.path.basename(path)}: must be a table on this disk, found {found}") from None
    return status.st_size, status.st_mtime_ns


def _hash(name: str) -> int:
    return xxhash.xxh64_intdigest(name.replace("\\", "/").rpartition("/")[2].encode("utf-8", "surrogatepass"))


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        word = value.strip().casefold()
        if word in _TRUTH:
            return _TRUTH[word]
        return number_of(word)
    return float(value) if isinstance(value, int | float) else None


def _equal(value: Any, wanted: str) -> bool:
    number, other = _number(value), _number(wanted)
    if number is not None and other is not None:
        return number == other
    return str(value).strip().casefold() == wanted.casefold()
