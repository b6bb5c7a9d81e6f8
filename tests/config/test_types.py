"""Which values of a YAML fit an annotation, and how annotations are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from composer_path.config.types import describe, fits


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, float, True),
        (True, float, False),
        (True, int, False),
        (1, bool, False),
        (1.0, int, False),
        ("a", str | None, True),
        (None, str | None, True),
        ([0.9, 1], tuple[float, float], True),
        ([0.9], tuple[float, float], False),
        ([1, "x"], list[int], False),
        ({"a": 1}, dict[str, float], True),
        ({"a": "x"}, dict[str, float], False),
        ("a", Literal["a", "b"], True),
        (True, Literal[1], False),
        ("p", Path, True),
        ("p", type, False),
        (object(), Any, True),
    ],
)
def test_yaml_values_fit_annotations(value: Any, annotation: Any, expected: bool) -> None:
    assert fits(value, annotation) is expected


def test_types_are_described_in_plain_words() -> None:
    assert describe(int | str | None) == "a whole number or text or null"
    assert describe(Literal["a"] | bool) == "'a' or true or false"
    assert describe(list[str]) == "a list of: text"
