"""Files of records: lists and lines, and bytes that are neither."""

from __future__ import annotations

from pathlib import Path

from composer_path.conversion.record_file import read_records


def test_a_list_and_lines_give_the_same_records(tmp_path: Path) -> None:
    as_list, as_lines = tmp_path / "a.json", tmp_path / "b.json"
    as_list.write_bytes(b'\xef\xbb\xbf [{"id": 1},\n {"id": 2}]')
    as_lines.write_bytes(b'\xef\xbb\xbf{"id": 1}\r\n\r\n{"id": 2}')
    assert [item.value for item in read_records(as_list)] == [{"id": 1}, {"id": 2}]
    assert [item.value for item in read_records(as_lines)] == [{"id": 1}, {"id": 2}]
    assert [item.where for item in read_records(as_list)] == ["record 0", "record 1"]
    assert [item.where for item in read_records(as_lines)] == ["record 0 (line 1)", "record 1 (line 3)"]


def test_a_bad_line_costs_only_its_record(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"id": 1}\n{"id": \xff}\n{"id": \n{"id": 4}\n')
    values = [item.value for item in read_records(path)]
    assert [getattr(value, "rule", "good") for value in values] == ["good", "not-utf8", "invalid-json", "good"]


def test_an_object_over_several_lines_is_one_problem(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('{\n "data": [\n  {"id": 1}\n ]\n}\n')
    (item,) = read_records(path)
    assert item.value.rule == "invalid-json"
    assert "one object over several lines" in str(item.value)
