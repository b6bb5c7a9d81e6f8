"""JSON of records: what Python's `json` would let pass is a fault of one record, with its place."""

from __future__ import annotations

import json
import sys

import pytest

from composer_path.records.rules import MAX_DEPTH, MAX_DIGITS, RecordError
from composer_path.records.strict_json import decode_json, list_elements


def refused(data: bytes) -> RecordError:
    with pytest.raises(RecordError) as caught:
        decode_json(data)
    return caught.value


def elements(data: bytes, line: int = 1) -> list[object]:
    return [element.value for element in list_elements(data, first_line=lambda: line)]


@pytest.mark.parametrize(
    ("data", "rule", "found"),
    [
        (b'{"a":\n "\xe4"}', "not-utf8", "byte 0xe4 at line 2, byte 8 of 11"),
        (b"\xff\xfe[\x00]\x00", "not-utf8", "byte 0xff at line 1, byte 0 of 6"),
        (b'[\n{"a": 1,}]', "invalid-json", "a comma before a closing bracket at line 2"),
        (b"[1, 2, ]", "invalid-json", "a comma before a closing bracket"),
        (b'{"a": 1}{"a": 2}', "invalid-json", "more after its end"),
        (b'{"a": 1}\0', "invalid-json", "a NUL byte"),
        (b'{"a": \0}', "invalid-json", "a NUL byte at line 1, column 7"),
        (b"{'a': 1}", "invalid-json", "line 1, column 2"),
        (b'{"a": "b\n"}', "invalid-json", "control character"),
        (b"", "invalid-json", "line 1, column 1"),
        (b"[" * 100_000, "invalid-json", "Brackets without an end"),
        (b"[NaN]", "bad-number", "NaN"),
        (b"[-Infinity]", "bad-number", "-Infinity"),
        (b"[1e999]", "bad-number", "beyond any float"),
        (b"[-1.5E+400]", "bad-number", "beyond any float"),
        (b"[" + b"1" * 5000 + b"]", "bad-number", "5000 digits"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "too-deep", f"more than {MAX_DEPTH} levels"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "too-deep", f"more than {MAX_DEPTH} levels"),
    ],
)
def test_what_json_would_let_pass_is_refused_with_what_was_found(data: bytes, rule: str, found: str) -> None:
    error = refused(data)
    assert error.rule == rule
    assert found in error.found


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b'{"image": "a", "image": "a"}', "image"),
        (b'{"conversations": [{}, {"value": "a", "from": "x", "value": "a"}]}', "conversations[1].value"),
        (b'{"image": [{"file": "a", "x": 1, "x": 2}]}', "image[0].x"),
        (b'{"meta": {"a b": [{"kind": {"score": 1, "sc\\u006fre": 2}}]}}', "meta.(a key)[0].kind.score"),
        (b'{"Miller Jane": 1, "Miller Jane": 2}', "(a key)"),
    ],
)
def test_a_key_given_twice_is_refused_with_its_place_and_without_names(data: bytes, where: str) -> None:
    error = refused(data)
    assert (error.rule, error.where) == ("duplicate-key", where)
    assert "Miller" not in str(error)


def test_a_bad_number_is_found_at_its_place() -> None:
    assert refused(b'{"meta": {"scores": [1, NaN]}}').where == "meta.scores[1]"


def test_good_json_is_what_python_reads() -> None:
    deep = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    brackets = json.dumps({"a": '[{"' * 200, "b": "\\" * 99, "c": [[], {}] * 99})
    number = "9" * MAX_DIGITS
    for text in (deep, brackets, number, "-0.0", "1e-999", ' {"a": null} \r\n', '"\\ud83d\\ude00"', '{"": {"": 1}}'):
        assert decode_json(b"\xef\xbb\xbf" + text.encode()) == json.loads(text)


def test_a_fault_in_a_list_is_one_elements_with_its_line() -> None:
    deep = b"[" * 5000 + b"]" * 5000
    parts = [b"1", b"NaN", b"\xe4".join((b'"', b'"')), deep, b'\n{"a":1,"a":2}', '"ä]"'.encode(), b'{"b": 1}']
    found = elements(b"[" + b",\n".join(parts) + b"]", line=5)
    rules = [value.rule if isinstance(value, RecordError) else value for value in found]
    assert rules == [1, "bad-number", "not-utf8", "too-deep", "duplicate-key", "ä]", {"b": 1}]
    wheres = [value.where for value in found if isinstance(value, RecordError)]
    assert wheres == ["line 6", "line 7", "line 8", "line 10: a"]


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"[1,\n{]", "column 2"),
        (b"[1,\n2 3]", "Expecting ',' delimiter' at line 2, column 3"),
        (b"[1,\n2", "line 2"),
        (b"[1,\n2,]", "a comma before a closing bracket at line 2"),
        (b"[1,\n2] [3]", "more after its end"),
        (b'[1,\n"\\q"]', "line 2"),
        (b"[1,\n" + b'{"a":' * 50_000, "Brackets without an end"),
    ],
)
def test_a_list_that_cannot_be_followed_ends_with_record_and_line(data: bytes, found: str) -> None:
    read = []
    with pytest.raises(RecordError, match=r"record [12], which begins at line 2") as caught:
        for element in list_elements(data, first_line=lambda: 1):
            read.append(element.value)
    assert caught.value.rule == "invalid-json" and found in caught.value.found
    assert read[0] == 1 and sys.getrecursionlimit() < 50_000


def test_the_bytes_of_elements_are_where_they_lie() -> None:
    data = '\ufeff [ {"a": "ä"},\r\n "🔬" , [1,2]\t]\n'.encode()
    pieces = [data[one.start : one.end] for one in list_elements(data, first_line=lambda: 1)]
    assert [json.loads(piece) for piece in pieces] == [{"a": "ä"}, "🔬", [1, 2]]
    bare = b'{"a": 1} ,\n[2], '
    assert [one.value for one in list_elements(bare, first_line=lambda: 1, bare=True)] == [{"a": 1}, [2]]
