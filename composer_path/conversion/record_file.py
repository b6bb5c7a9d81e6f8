"""The input file of records, a JSON list or JSONL, read record by record with its positions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer_path.records.rules import RecordError
from composer_path.storage.places import open_file

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class RawRecord:
    """One element of the input file, not checked yet."""

    position: int | None  # from 0, blank lines not counted; None for a problem of the whole file
    line: int | None  # from 1 in a JSONL file, else None
    value: Any  # the decoded JSON, or the problem that kept it from being decoded
    start: int = 0  # its first byte in the file
    end: int = 0  # the byte after its last one (after the line's end in a JSONL file)

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
        start = file.read(4096).removeprefix(_BYTE_ORDER_MARK).lstrip()[:1]
        file.seek(0)
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
        elements = file.read(end - start).rstrip(b" \t\r\n").removesuffix(b",")
        values = _decode(b"[" + elements + b"]")
        for index, value in enumerate([] if isinstance(values, RecordError) else values, start=position):
            yield RawRecord(index, None, value)


def decode_json(data: bytes, first_line: int = 1) -> Any:
    """Decode UTF-8 JSON; a `RecordError` (not-utf8, invalid-json) gives the line and never the text."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        found = f"byte 0x{data[error.start]:02x} at line {line}, byte {error.start} of {len(data)}"
        raise RecordError("not-utf8", found, "save the file as UTF-8") from None
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        found = f"'{error.msg}' at line {first_line + error.lineno - 1}, column {error.colno}"
    except RecursionError:
        found = "too many brackets inside each other"
    except ValueError as error:
        found = "a number that is not JSON" if error.args != ("constant",) else "NaN or Infinity"
    raise RecordError("invalid-json", found, "correct the JSON there") from None


def _refuse_constant(name: str) -> None:
    raise ValueError("constant")  # Python reads NaN and Infinity, which JSON does not have


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


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


def _read_list(data: bytes) -> Iterator[RawRecord]:
    values = _decode(data)
    if isinstance(values, RecordError):
        yield RawRecord(None, None, values)
        return
    for position, (value, (start, end)) in enumerate(zip(values, _places_in_list(data), strict=True)):
        yield RawRecord(position, None, value, start, end)


def _places_in_list(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield first byte and end of each element of a valid JSON list."""
    text = data.decode("utf-8-sig")
    offset = len(data) - len(text.encode()) if not text.isascii() else len(data) - len(text)
    at, counted = text.index("[") + 1, 0
    while True:
        while text[at] in " \t\r\n,":
            at += 1
        if text[at] == "]":
            return
        _, stop = _DECODER.raw_decode(text, at)
        start = offset + len(text[counted:at].encode())
        offset = start + len(text[at:stop].encode())
        yield start, offset
        at = counted = stop


def _decode(data: bytes, first_line: int = 1) -> Any:
    try:
        return decode_json(data, first_line)
    except RecordError as error:
        return error
