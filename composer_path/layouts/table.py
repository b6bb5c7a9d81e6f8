"""A table of text, CSV or TSV, read row by row with its lines and bytes.

Quoted fields may hold the separator and line ends. What can't be read with certainty is refused: columns without a name
or with the same one, rows with more or fewer fields than columns, quotes that are never closed.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from composer_path.layouts.row import plain_key
from composer_path.records.key_names import ROW_NUMBER
from composer_path.records.rules import RecordError

# A picture as base64 may take a whole field; a longer one is a quote that was never closed.
MAX_FIELD = 64 * 2**20
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UNCLOSED = "unexpected end of data"  # csv's words for a quote that is open at the end of the file
# What an empty field is written as, by pandas and by databases.
_NOTHING = frozenset(("", "nan", "NaN", "<NA>", "NULL", "null"))
_SURROGATE = re.compile("[\udc80-\udcff]")


class TableError(ValueError):
    """The table as a whole can't be read."""

    def __init__(self, problem: RecordError) -> None:
        super().__init__(str(problem))
        self.problem = problem


@dataclass(frozen=True)
class Line:
    """One row of the table; `values` holds a string or None by column."""

    line: int  # from 1, where it begins
    start: int  # its first byte in the file
    end: int
    values: dict[str, Any] = field(default_factory=dict)
    problem: RecordError | None = None


class Table:
    """The columns of a table, and its rows; `hash`, an object with `update`, is fed all that is read."""

    def __init__(self, file: Any, name: str, hash: Any = None) -> None:
        self._file, self._hash = file, hash
        self._at, self._line = 0, 1  # of what is read next
        csv.field_size_limit(MAX_FIELD)
        first = self._read_line().removeprefix(_BYTE_ORDER_MARK)
        text = _decoded(first)
        by_ending = "\t" if name.lower().endswith((".tsv", ".tab")) else ","
        separators = [by_ending, *(sign for sign in _SEPARATORS if sign != by_ending)]
        self.separator = next((sign for sign in separators if sign in text), by_ending)
        # A name may be quoted, and hold a line end then: read it as any row is read.
        rest = iter(self._read_line, b"")
        try:
            header = next(csv.reader(_texts(first, rest), delimiter=self.separator, strict=True), [])
        except csv.Error:
            raise TableError(_invalid("a first line that is no list of columns", "line 1")) from None
        names = [name.strip() for name in header]
        if names and not names[0]:
            names[0] = ROW_NUMBER  # as pandas writes it
        _check_columns(names)
        self.columns = names

    def rows(self, start: int | None = None, end: int | None = None, line: int = 1) -> Iterator[Line]:
        """Yield the rows, or those between two bytes of which the first is that of a line."""
        if start is not None:
            self._file.seek(start)
            self._at, self._line = start, line
        reader = csv.reader(_texts(b"", iter(self._read_line, b"")), delimiter=self.separator, strict=True)
        while end is None or self._at < end:
            first_line, first = self._line, self._at
            problem, fields = None, []
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                problem = self._problem(error)
            if problem is None and not fields:
                continue  # a blank line
            if problem is None:
                problem = self._check(fields)
            found = [] if problem else (None if text in _NOTHING else text for text in fields)
            values = dict(zip(self.columns, found, strict=False))
            yield Line(first_line, first, self._at, values, problem)

    def _problem(self, error: csv.Error) -> RecordError:
        """Say what csv found; a quote that is open at the end has taken all that follows, which ends the reading."""
        message = str(error)
        if _UNCLOSED in message or "field larger than field limit" in message:
            raise TableError(_invalid("a quote that is not closed, or a field of more than 64 MB", self._where()))
        found = "a line end without quotes" if "new-line" in message else "a quote amid a field"
        return _invalid(found)

    def _check(self, fields: list[str]) -> RecordError | None:
        if len(fields) != len(self.columns):
            return _invalid(f"{len(fields)} fields for {len(self.columns)} columns")
        if any(_SURROGATE.search(text) for text in fields):
            return RecordError("not-utf8", "bytes that are no UTF-8", "save the file as UTF-8")
        return None

    def _where(self) -> str:
        return f"up to line {self._line - 1}"

    def _read_line(self) -> bytes:
        data: bytes = self._file.readline(2 * MAX_FIELD)
        if self._hash is not None:
            self._hash.update(data)
        if len(data) == 2 * MAX_FIELD:
            raise TableError(_invalid("a line of more than 128 MB", f"line {self._line}"))
        self._at += len(data)
        self._line += bool(data)
        return data


def _texts(first: bytes, rest: Iterator[bytes]) -> Iterator[str]:
    if first:
        yield first.decode("utf-8", "surrogateescape")
    for data in rest:
        yield data.decode("utf-8", "surrogateescape")


def _decoded(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data:
        raise TableError(RecordError("not-utf8", "UTF-16, or bytes that are no text", "save the file as UTF-8"))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        found = "bytes that are no UTF-8 among the columns' names"
        raise TableError(RecordError("not-utf8", found, "save the file as UTF-8")) from None


def _check_columns(names: list[str]) -> None:
    if len(names) < 2:
        raise TableError(_invalid("no two columns in the first line", "line 1"))
    if empty := sum(not name for name in names):
        raise TableError(_invalid(f"{empty} columns without a name", "line 1"))
    if len({plain_key(name) for name in names}) < len(names):
        raise TableError(_invalid("columns of the same name", "line 1"))


def _invalid(found: str, where: str = "") -> RecordError:
    fix = "write it with a name for each column, and quotes around fields that hold separators, quotes or line ends"
    return RecordError("invalid-table", found, fix, where)
