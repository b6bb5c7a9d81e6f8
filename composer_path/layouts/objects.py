"""A JSON object at the top of a file: records by index (ARCH), or by category and split (PathMMU)."""

from __future__ import annotations

from typing import Any

from composer_path.layouts.registry import READABLE, looks_like, recognise
from composer_path.layouts.row import plain_key
from composer_path.records.rules import RecordError

_SPLITS = {"train", "val", "test", "test_tiny"}
_MAX_EXAMINED = 20


def rows_of(value: dict[str, Any], columns_asked: set[str]) -> list[Any]:
    """Return the rows of a whole file's object, in its order.

    Args:
        value: The object.
        columns_asked: What `--where` asks for: a file whose splits share records wants one to be chosen.

    Raises:
        RecordError: It is no object of records, or of no layout.
    """
    if _has_layout(value):
        return [value]
    if _is_split(value):
        value = {"": value}
    rows = list(value.values())
    if value and all(isinstance(one, dict) for one in rows) and all(map(_is_split, rows)):
        if "split" not in columns_asked:
            splits = sorted({name for one in rows for name in one})
            fix = f"choose one with --where split={splits[-1]}"
            raise RecordError(
                "unknown-layout", f"splits in one file ({', '.join(splits)}), which may repeat records", fix
            )
        return [
            {**row, "category": category or None, "split": split} if isinstance(row, dict) else row
            for category, splits in value.items()
            for split, entries in splits.items()
            for row in entries
        ]
    if not rows or not all(isinstance(one, dict) for one in rows):
        raise RecordError("unknown-layout", _described(value), READABLE)
    for row in rows[:_MAX_EXAMINED]:
        recognise(row)
    return rows


def is_one_record(value: dict[str, Any]) -> bool:
    """Whether an object is a record by itself, not a file of several."""
    try:
        recognise(value)
    except RecordError as error:
        return error.rule == "unsupported-layout" or not any(isinstance(one, dict | list) for one in value.values())
    return True


def _has_layout(value: dict[str, Any]) -> bool:
    try:
        recognise(value)
    except RecordError:
        return False
    return True


def _is_split(value: dict[str, Any]) -> bool:
    names = {plain_key(name) for name in value}
    lists = all(isinstance(one, list) for one in value.values())
    return bool(names) and names <= {plain_key(name) for name in _SPLITS} and lists


def _described(value: dict[str, Any]) -> str:
    """Say what an object looks like, without its values and without keys that no layout has."""
    lists = [one for one in value.values() if isinstance(one, list)]
    if len(lists) == 1 and lists[0] and isinstance(lists[0][0], dict):
        rows = len(lists[0])
        found = f"one object that holds a list of {rows} objects under one of its keys (write this list alone), each"
        return f"{found} with {looks_like(lists[0][0])}"
    return f"one object for the whole file with {looks_like(value)}"
