"""The schema follows the signatures, all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from composer_path.config.check import check_keys
from composer_path.config.schema import Key, NoDefault, Section, section_of
from composer_path.config.sections import config_schema


def test_no_key_goes_unchecked_and_every_default_is_accepted() -> None:
    """Each annotation of each constructor resolves, and what it gives by default passes its own rules."""
    counted = 0
    for path, node in all_keys(config_schema(), ""):
        counted += 1
        assert node.annotation is not Any, path
        if not isinstance(node.default, NoDefault) and not str(node.default).startswith("${"):  # another key's value
            assert list(check_keys(node.default, node, path)) == []
    assert counted > 340


def all_keys(node: Any, path: str) -> Iterator[tuple[str, Key]]:
    """Every key of a schema, with its path."""
    if isinstance(node, Key):
        yield path, node
        return
    sections = [node] if isinstance(node, Section) else list(node.sections.values())
    for section in sections:
        for name, member in [*section.keys.items(), *([("*", section.members)] if section.members else [])]:
            yield from all_keys(member, f"{path}.{name}")


def test_an_annotation_that_cant_be_resolved_is_an_error_of_ours() -> None:
    def build(folder: NoSuchName) -> None:  # type: ignore[name-defined]  # noqa: F821
        """A constructor whose type is imported for a type checker only."""

    def bare(folder) -> None:  # type: ignore[no-untyped-def]
        """A constructor without types."""

    for function in (build, bare):
        with pytest.raises(
            TypeError, match=rf"{function.__name__}, parameter folder: its annotation can't be resolved"
        ):
            section_of(function)
    assert section_of(build, changes={"folder": {"annotation": str}}).keys["folder"] == Key(str)
