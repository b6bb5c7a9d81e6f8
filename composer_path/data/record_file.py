"""The input file of records, a JSON list or JSONL, read record by record with its positions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer_path.data.conversation import RecordError


@dataclass(frozen=True)
class RawRecord:
    """One element of the input file, not checked yet.

    Attributes:
        position: its number from 0, blank lines not counted; None for a problem of the whole file.
        line: its line from 1 in a JSONL file, else None.
        value: the decoded JSON, or the problem that kept it from being decoded.
    """

    position: int | None
    line: int | None
    value: Any

    @property
    def where(self) -> str:
        """Its place as errors show it."""
        if self.position is None:
            return "the whole file"
        return f"record {self.position}" + (f" (line {self.line})" if self.line is not None else "")


def read_records(path: str | Path) -> Iterator[RawRecord]:
    """Yield the records of a JSON list (read whole) or of a JSONL file (read line by line).

    What the file is shows in its first character, not in its name: '[' begins a list. Lines that can't be
    decoded are yielded as problems, so that all of them are found in one pass.
    """
    with open(path, "rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        file.seek(0)
        if start == b"[":
            yield from _read_list(file.read())
            return
        if Path(path).suffix != ".jsonl" and isinstance(_decode(file.readline(), first_line=1), RecordError):
            file.seek(0)
            if isinstance(_decode(file.read(), first_line=1), dict):
                # Records wrapped in an object over many lines: one problem, not one for each line.
                fix = "write the records as a list, [{...}, {...}]"
                error = RecordError("invalid-json", "one object over several lines", fix)
                yield RawRecord(None, None, error)
                return
        file.seek(0)
        position = 0
        for line, data in enumerate(file, start=1):
            if data.strip():
                yield RawRecord(position, line, _decode(data, line))
                position += 1


def decode_json(data: bytes, first_line: int = 1) -> Any:
    """Decode UTF-8 JSON, with errors that give the line and never the text.

    Args:
        data: a whole JSON file, or one line of a JSONL file.
        first_line: number of the first line of ``data`` in its file, from 1.

    Raises:
        RecordError: 'not-utf8' or 'invalid-json'.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        found = f"byte 0x{data[error.start]:02x} at line {line}, byte {error.start} of {len(data)}"
        raise RecordError("not-utf8", found, "save the file as UTF-8") from None
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        found = f"'{error.msg}' at line {first_line + error.lineno - 1}, column {error.colno}"
    except RecursionError:
        found = "too many brackets inside each other"
    except ValueError as error:
        found = "a number that is not JSON" if error.args != ("constant",) else "NaN or Infinity"
    raise RecordError("invalid-json", found, "correct the JSON there") from None


def _refuse_constant(name: str) -> None:
    raise ValueError("constant")  # Python reads NaN and Infinity, which JSON does not have


def _read_list(data: bytes) -> Iterator[RawRecord]:
    values = _decode(data, first_line=1)
    if isinstance(values, RecordError):
        yield RawRecord(None, None, values)
        return
    for position, value in enumerate(values):
        yield RawRecord(position, None, value)


def _decode(data: bytes, first_line: int) -> Any:
    try:
        return decode_json(data, first_line)
    except RecordError as error:
        return error
