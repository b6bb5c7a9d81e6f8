"""The input file of records, a JSON list or JSONL, read record by record with its positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from composer_path.records.rules import RecordError
from composer_path.records.strict_json import decode_json, list_elements
from composer_path.storage.places import open_file

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PIECE = 2**20  # bytes read at once to count lines


@dataclass(frozen=True)
class RawRecord:
    """One element of the input file, not checked yet."""

    position: int | None  # from 0, blank lines not counted; None for a problem of the whole file
    line: int | None  # from 1 in a JSONL file, else None
    value: Any  # the decoded JSON, or the problem that kept it from being decoded
    start: int = 0  # its first byte in the file
    end: int = 0  # the byte after its last one (after the line's end in a JSONL file)
    ignored: tuple[str, ...] = ()  # keys of its row that its layout doesn't read
    embedded: Mapping[str, bytes] = field(default_factory=dict, repr=False)  # pictures in the row, by name
    layout: str = ""  # that it was read by; empty where none fits

    @property
    def where(self) -> str:
        """Its place as errors show it."""
        return place_of(self.position, self.line)

    def without_value(self) -> RawRecord:
        """Its place alone, for what mustn't keep or show what it says."""
        return RawRecord(self.position, self.line, None)


def place_of(position: int | None, line: int | None) -> str:
    """Say where a record stands as errors show it."""
    if position is None:
        return "the whole file"
    return f"record {position}" + (f" (line {line})" if line is not None else "")


def read_records(path: str | Path, hash: Any = None) -> Iterator[RawRecord]:
    """Yield the records of a JSON list (read whole) or of a JSONL file (read line by line).

    What the file is shows in its first character, not in its name: '[' begins a list. Lines that can't be
    decoded are yielded as problems, so that all of them are found in one pass. `hash`, an object with `update`, is fed
    the whole file on the way.
    """
    with open_file(path) as file:
        head = file.read(4096)
        start = head.removeprefix(_BYTE_ORDER_MARK).lstrip()[:1]
        file.seek(0)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head[:4]:
            yield RawRecord(
                None, None, RecordError("not-utf8", "UTF-16, UTF-32 or NUL bytes", "save the file as UTF-8")
            )
            return
        if start == b"[":
            data = file.read()
            if hash is not None:
                hash.update(data)
            yield from _read_list(data)
            return
        if Path(path).suffix != ".jsonl" and isinstance(_decode(file.readline()), RecordError):
            file.seek(0)
            if isinstance(_decode(file.read()), dict):
                # Records wrapped in an object over many lines: one problem, not one for each line.
                fix = "write the records as a list, [{...}, {...}]"
                error = RecordError("invalid-json", "one object over several lines", fix)
                yield RawRecord(None, None, error)
                return
        file.seek(0)
        yield from _read_lines(file, hash)


def read_range(path: str | Path, start: int, end: int, position: int, line: int | None) -> Iterator[RawRecord]:
    """Yield the records between two bytes of a file, as a first reading of it has found them.

    Position and line are the first record's; without a line it is a list, which yields nothing if it doesn't decode.
    """
    with open_file(path) as file:
        file.seek(start)
        if line is not None:
            yield from _read_lines(file, None, start, end, position, line)
            return
        for record in _read_list(file.read(end - start), position, partial(_line_at, file, start)):
            if record.position is not None:  # else it has changed since
                yield record


def _read_lines(
    file: Any, hash: Any, start: int = 0, end: int | None = None, position: int = 0, line: int = 1
) -> Iterator[RawRecord]:
    for data in file:
        if hash is not None:
            hash.update(data)
        stop = start + len(data)
        if data.strip():
            yield RawRecord(position, line, _decode(data, line), start, stop)
            position += 1
        start, line = stop, line + 1
        if end is not None and start >= end:
            return


def _read_list(data: bytes, position: int = 0, line: Callable[[], int] | None = None) -> Iterator[RawRecord]:
    """The elements of a list, or of a piece of one that begins at a line, which is asked for if something is wrong."""
    try:
        for element in list_elements(data, first_line=line or (lambda: 1), bare=line is not None):
            yield RawRecord(position, None, element.value, element.start, element.end)
            position += 1
    except RecordError as error:
        yield RawRecord(None, None, error)


def _line_at(file: Any, byte: int) -> int:
    """The line that a byte of a file stands in."""
    line = 1
    file.seek(0)
    while byte > 0 and (data := file.read(min(byte, _PIECE))):
        line, byte = line + data.count(b"\n"), byte - len(data)
    return line


def _decode(data: bytes, first_line: int = 1) -> Any:
    try:
        return decode_json(data, first_line)
    except RecordError as error:
        return error
