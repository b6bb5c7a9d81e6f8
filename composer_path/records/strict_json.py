"""JSON as it is meant: what Python's `json` lets pass without a word is refused, with its place.

A key given twice in an object (Python takes the last), NaN and Infinity, numbers beyond any float, thousands of digits,
and nesting that ends Python's recursion. In a list of records such a fault is one record's; only where the brackets
themselves can't be followed the reading ends.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from composer_path.records.key_names import NOT_SHOWN, shown_key
from composer_path.records.rules import MAX_DEPTH, MAX_DIGITS, RecordError

_STRING = r'"(?:[^"\\]++|\\.)*+"'
_BRACKETS = re.compile(rf"{_STRING}|(?P<open>[\[{{])|(?P<close>[\]}}])", re.DOTALL)
_BAD_BYTE = re.compile("[\udc80-\udcff]")
_BLANKS = re.compile(r"[ \t\r\n]*")
_FIX = "correct the JSON there"


@dataclass(frozen=True)
class Element:
    """One element of a list: its value, or the `RecordError` that it is, and its bytes."""

    value: Any
    start: int
    end: int


def decode_json(data: bytes, first_line: int = 1) -> Any:
    """Decode UTF-8 JSON; a `RecordError` says what is wrong with it and where, and never the text."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        found = f"byte 0x{data[error.start]:02x} at line {line}, byte {error.start} of {len(data)}"
        raise RecordError("not-utf8", found, "save the file as UTF-8") from None
    try:
        start = _after_blanks(text, 0)
        value, end = _of_thread.decoder.decode(text, start)
        if (rest := _after_blanks(text, end)) < len(text):
            raise json.JSONDecodeError("Extra data", text, rest)
    except json.JSONDecodeError as error:
        raise _invalid(error, first_line) from None
    if isinstance(value, RecordError):
        raise value
    return value


def list_elements(data: bytes, *, first_line: Callable[[], int], bare: bool = False) -> Iterator[Element]:
    """Yield the elements of a JSON list one by one; `bare` is a piece of one, without its brackets.

    A fault that leaves the brackets whole is its element's value, with the line. `first_line`, the number of the
    data's first one, is asked for when there is a fault.

    Raises:
        RecordError: From here on it is no list; the place says which record and line.
    """
    text = data.decode("utf-8", "surrogateescape")
    places, decoder, line = _Places(text), _Decoder(), _Lines(text, first_line)
    at, index = (0 if bare else text.index("[") + 1), 0
    while (at := _after_blanks(text, at)) < len(text) or not bare:
        start = at
        try:
            if text[at : at + 1] == "]" and not bare:
                if index and _is_behind_comma(text, at):
                    raise json.JSONDecodeError("Illegal trailing comma before end of array", text, at)
                if (at := _after_blanks(text, at + 1)) < len(text):
                    raise json.JSONDecodeError("Extra data", text, at)
                return
            value, end = decoder.decode(text, at)
            at = _after_blanks(text, end)
            if text[at : at + 1] == ",":
                at += 1
            elif text[at : at + 1] != "]" and not (bare and at == len(text)):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        except json.JSONDecodeError as error:
            raise _invalid(error, first_line()).at(f"record {index}, which begins at line {line.of(start)}") from None
        if not text.isascii() and (bad := _BAD_BYTE.search(text, start, end)):
            found = f"byte 0x{ord(bad[0]) - 0xDC00:02x}"
            value = RecordError("not-utf8", found, "save the file as UTF-8")
        if isinstance(value, RecordError):
            value = value.at(f"line {line.of(start)}")
        yield Element(value, places.of(start), places.of(end))
        index += 1


@dataclass(frozen=True)
class _Fault:
    """Stands in a decoded value where it can't be used."""

    rule: str
    found: str
    fix: str
    key: str | None = None


class _Decoder:
    """Decodes one value after the other, and notes what `json` would let pass."""

    def __init__(self) -> None:
        self._has_fault = False
        self._json = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_constant=lambda name: self._fault("bad-number", name, "write a number, or leave the key out"),
            parse_float=self._float,
            parse_int=self._int,
        )

    def decode(self, text: str, start: int) -> tuple[Any, int]:
        """Decode the value that begins at `start`: itself, or the `RecordError` that it is, and where it ends."""
        self._has_fault = False
        too_deep = False
        try:
            value, end = self._json.raw_decode(text, start)
        except RecursionError:
            value, too_deep, end = None, True, _end_of_brackets(text, start)
        if too_deep or _is_deep(text, start, end):
            found = f"more than {MAX_DEPTH} levels"
            return RecordError("too-deep", found, "flatten it, or leave it out"), end
        if self._has_fault:
            where, fault = next(_faults(value, ""))
            return RecordError(fault.rule, fault.found, fault.fix, where), end
        return value, end

    def _fault(self, rule: str, found: str, fix: str, key: str | None = None) -> _Fault:
        self._has_fault = True
        return _Fault(rule, found, fix, key)

    def _object(self, pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        return self._fault("duplicate-key", "a second value", "keep the right one", twice)

    def _float(self, digits: str) -> Any:
        value = float(digits)
        return value if math.isfinite(value) else self._fault("bad-number", "a number beyond any float", "correct it")

    def _int(self, digits: str) -> Any:
        if len(digits) <= MAX_DIGITS:
            return int(digits)
        return self._fault("bad-number", f"one of {len(digits)} digits", "write it as a string, in quotes")


class _OfThread(threading.local):
    """One decoder for each thread: to make one takes as long as to decode a record."""

    def __init__(self) -> None:
        self.decoder = _Decoder()


_of_thread = _OfThread()


class _Places:
    """Bytes before a letter of a text, asked in order."""

    def __init__(self, text: str) -> None:
        self._text, self._letter, self._byte = text, 0, 0

    def of(self, letter: int) -> int:
        if self._text.isascii():
            return letter
        self._byte += len(self._text[self._letter : letter].encode("utf-8", "surrogateescape"))
        self._letter = letter
        return self._byte


class _Lines:
    """Line of a letter of a text, asked in order."""

    def __init__(self, text: str, first: Callable[[], int]) -> None:
        self._text, self._first, self._letter, self._line = text, first, 0, 0

    def of(self, letter: int) -> int:
        self._line = self._line or self._first()
        self._line += self._text.count("\n", self._letter, letter)
        self._letter = letter
        return self._line


def _faults(value: Any, where: str) -> Iterator[tuple[str, _Fault]]:
    """Yield the faults of a value no deeper than `MAX_DEPTH`, with their places, in which no key is a name."""
    if isinstance(value, _Fault):
        yield ".".join(filter(None, (where, value.key and _key(value.key)))), value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _faults(item, f"{where}.{_key(key)}" if where else _key(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _faults(item, f"{where}[{index}]")


def _key(key: str) -> str:
    shown = shown_key(key)
    return "(a key)" if shown == NOT_SHOWN else shown


def _after_blanks(text: str, start: int) -> int:
    match = _BLANKS.match(text, start)
    return start if match is None else match.end()


def _is_behind_comma(text: str, place: int) -> bool:
    return text[max(0, place - 1000) : place].rstrip(" \t\r\n").endswith(",")


def _is_deep(text: str, start: int, end: int) -> bool:
    """Whether a value has more levels than allowed; most have fewer brackets than that."""
    if text.count("[", start, end) + text.count("{", start, end) <= MAX_DEPTH:
        return False
    depth = 0
    for match in _BRACKETS.finditer(text, start, end):
        depth += 1 if match["open"] else -1 if match["close"] else 0
        if depth > MAX_DEPTH:
            return True
    return False


def _end_of_brackets(text: str, start: int) -> int:
    """The letter after the bracket that closes the one at `start`."""
    depth = 0
    for match in _BRACKETS.finditer(text, start):
        depth += 1 if match["open"] else -1 if match["close"] else 0
        if depth == 0:
            return match.end()
    raise json.JSONDecodeError("Brackets without an end", text, start)


def _invalid(error: json.JSONDecodeError, first_line: int) -> RecordError:
    """What `json` says, with the line in the file; what it doesn't say well in words of ours."""
    text, at, said, fix = error.doc, error.pos, f"'{error.msg}'", _FIX
    if "\0" in text[at : at + 1]:
        said, fix = "a NUL byte", "save the file as UTF-8 text, whole"
    elif _BAD_BYTE.match(text, at):
        said, fix = f"byte 0x{ord(text[at]) - 0xDC00:02x}", "save the file as UTF-8"
    elif "trailing comma" in error.msg or (text[at : at + 1] in ("]", "}") and _is_behind_comma(text, at)):
        said = "a comma before a closing bracket"
    elif error.msg == "Extra data":
        said, fix = "more after its end ('Extra data')", "write one record a line, or all in one list"
    place = f"at line {first_line + error.lineno - 1}, column {error.colno}"
    return RecordError("invalid-json", f"{said} {place}", fix)
