"""The list of mutants is of the package as it is."""

from __future__ import annotations

from mutants import check


def test_every_line_that_is_to_be_broken_is_there_once() -> None:
    assert check() == []
