"""The input of a conversion, whatever kind of file it is: rows with their places, read into plain records.

What a file is shows in its first bytes; only a table of text is told by its name, too. A place is a number of bytes in
JSON lists, JSONL and tables of text, and a number of rows in parquet and in JSON objects.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, Literal

from composer_path.conversion.record_file import RawRecord, read_range, read_records
from composer_path.layouts.objects import is_one_record, rows_of
from composer_path.layouts.parquet import ParquetFile, holds_bytes
from composer_path.layouts.reading import Reading
from composer_path.layouts.registry import READABLE, looks_like, recognise
from composer_path.layouts.row import plain_key
from composer_path.layouts.table import Line, Table, TableError
from composer_path.records.rules import RecordError
from composer_path.records.strict_json import decode_json
from composer_path.storage.places import open_file

Kind = Literal["json", "object", "table", "parquet"]

_TABLE_ENDINGS = (".csv", ".tsv", ".tab")
_JSON_ENDINGS = (".json", ".jsonl", ".ndjson")
_HEAD_BYTES = 4096
_HASHED_BYTES = 4 * 2**20
# What a file of these first bytes is. A pickle is never opened: opening one runs what it says.
_FOREIGN = {
    b"\x1f\x8b": "gzip, unpack it first",
    b"PK\x03\x04": "a ZIP archive (or Excel), unpack it, or save it as CSV, first",
    b"BZh": "bzip2, unpack it first",
    b"\xfd7zXZ": "xz, unpack it first",
    b"\x28\xb5\x2f\xfd": "zstd, unpack it first",
    b"ARROW1": "an Arrow file, write it as parquet first",
    b"SQLite format 3": "an SQLite database, write it as CSV first",
    b"\x89HDF": "HDF5, which holds features",
    b"FEA1": "a Feather file, write it as parquet first",
    b"PARE": "an encrypted parquet file, write it without encryption first",
    b"\xd0\xcf\x11\xe0": "an Office file, save it as CSV first",
    b"%PDF": "a PDF file",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"version https://git-lfs": "a Git LFS pointer in place of the file, run `git lfs pull` first",
    b"/annex/objects": "a git-annex pointer in place of the file, run `git annex get` first",
    b"<!doctype html": "an HTML page in place of the file, fetch the file itself",
    b"<html": "an HTML page in place of the file, fetch the file itself",
    b"<?xml": "an XML file, or a server's error message in place of the file",
}
_PICKLE = tuple(bytes([0x80, version]) for version in range(2, 6))
# A file of which as many first rows are of no layout is refused as a whole.
_NUM_EXAMINED = 20
_NOT_READ = ("unknown-layout", "unsupported-layout")


class InputFile:
    """A file of records, and how it is read."""

    def __init__(self, path: str, reading: Reading) -> None:
        self._path, self._reading = path, reading

    def records(self, hash: Any = None) -> Iterator[RawRecord]:
        """Yield every record, or the problem of the whole file; `hash`, with `update`, is fed all its bytes."""
        rows = self._records(hash)
        first = list(itertools.islice(rows, _NUM_EXAMINED))
        errors = [one.value for one in first if isinstance(one.value, RecordError) and one.value.rule in _NOT_READ]
        if len(errors) == len(first) > 0 and len({str(error) for error in errors}) == 1:
            yield RawRecord(None, None, errors[0])
            return
        yield from first
        yield from rows

    def range(self, start: int, end: int, position: int, line: int | None) -> Iterator[RawRecord]:
        """Yield the records between two places, as a first reading of all has found them."""
        kind = self._kind()
        if kind == "json":
            return map(self._read, read_range(self._path, start, end, position, line))
        if kind == "object":
            return self._object_rows(start, end)
        if kind == "parquet":
            return self._parquet_rows(start, end)
        return self._table_rows(None, start, end, position, line or 1)

    def _records(self, hash: Any) -> Iterator[RawRecord]:
        try:
            kind = self._kind()
            if kind == "json":
                yield from map(self._read, read_records(self._path, hash))
                return
            if kind == "table":
                yield from self._table_rows(hash)
                return
            if hash is not None:
                with open_file(self._path) as file:
                    while data := file.read(_HASHED_BYTES):
                        hash.update(data)
            yield from self._object_rows() if kind == "object" else self._parquet_rows()
        except TableError as error:
            yield RawRecord(None, None, error.problem)
        except RecordError as error:
            yield RawRecord(None, None, error)

    def _read(self, row: RawRecord, layout: str | None = None) -> RawRecord:
        """Return a row as a plain record, by the layout of its file if that has one."""
        value, read = self._reading.record(row.value, row.position, layout)
        if not isinstance(value, dict):
            return replace(row, value=value, layout=read.layout)
        return replace(row, value=value, ignored=read.ignored, embedded=read.embedded, layout=read.layout)

    def _kind(self) -> Kind:
        with open_file(self._path) as file:
            head = file.read(_HEAD_BYTES)
            if head[:4] == b"PAR1":
                return "parquet"
            if not head:
                return "json"  # which holds no record
            fix = "give JSON, JSONL, CSV, TSV or parquet"
            if head.startswith(_PICKLE):
                found = "a pickle, which runs code when it is opened"
                raise RecordError("unsupported-layout", found, "take the set's parquet or JSON files")
            for magic, what in _FOREIGN.items():
                if head.startswith(magic) or head[:64].lower().startswith(magic):
                    raise RecordError("unsupported-layout", f"a file of another kind: {what}", fix)
            start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
            ending = PurePosixPath(self._path).suffix.lower()
            if start not in (b"[", b"{") and ending in _TABLE_ENDINGS:
                return "table"
            if start not in (b"[", b"{") and ending not in (*_JSON_ENDINGS, ""):
                found = "text that begins like no JSON"
                raise RecordError("invalid-json", found, "name a table .csv or .tsv, and records .json or .jsonl")
            if start != b"{" or ending == ".jsonl":
                return "json"
            file.seek(0)
            return "object" if _is_object(file) else "json"

    def _table_rows(
        self, hash: Any, start: int | None = None, end: int | None = None, position: int = 0, first_line: int = 1
    ) -> Iterator[RawRecord]:
        with open_file(self._path) as file:
            table = Table(file, self._path, hash)
            layout = self._layout_of(table.columns)
            for number, line in enumerate(table.rows(start, end, first_line), start=position):
                yield self._read(_raw(number, line), layout)

    def _parquet_rows(self, start: int = 0, end: int | None = None) -> Iterator[RawRecord]:
        with open_file(self._path) as file:
            parquet = ParquetFile(file)
            layout = self._layout_of(parquet.columns)
            for number, values in enumerate(parquet.rows(start, end), start=start):
                row = self._read(RawRecord(number, None, values, number, number + 1), layout)
                if holds_bytes(row.value):
                    error = RecordError("wrong-type", "bytes where a text belongs", "store texts as strings")
                    row = replace(row, value=error)
                yield row

    def _object_rows(self, start: int = 0, end: int | None = None) -> Iterator[RawRecord]:
        with open_file(self._path) as file:
            value = decode_json(file.read())
        asked = {plain_key(condition.column) for condition in self._reading.conditions if condition.table is None}
        for number, row in enumerate(rows_of(value, asked)[start:end], start=start):
            yield self._read(RawRecord(number, None, row, number, number + 1))

    def _layout_of(self, columns: list[str]) -> str | None:
        """Return the layout of a table's columns, whatever its rows leave empty; None to look at each row's turns."""
        if self._reading.layout != "auto":
            return None
        try:
            layout = recognise(dict.fromkeys(columns, ""))
            if layout.name == "llava" and "conversations" not in columns:
                raise RecordError("unknown-layout", looks_like(columns), READABLE)
        except RecordError as error:
            raise RecordError(error.rule, f"a table of {len(columns)} columns: {error.found}", error.fix) from None
        return None if layout.name == "llava" else layout.name


def _raw(number: int, line: Line) -> RawRecord:
    return RawRecord(number, line.line, line.problem or line.values, line.start, line.end)


def _is_object(file: Any) -> bool:
    """Whether a file that begins with '{' is one object, and not a record on each line."""
    line = file.readline()
    try:
        value = decode_json(line)
    except RecordError:
        value = None
    if isinstance(value, dict):
        return not is_one_record(value) and not file.readline().strip()
    try:
        return isinstance(decode_json(line + file.read()), dict)
    except RecordError:
        return False
