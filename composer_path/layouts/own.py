"""The base of record layouts of one's own, and how a row is read by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from composer_path.layouts.row import Row
from composer_path.own_parts.registry import own_classes
from composer_path.records.rules import RecordError


class RecordLayout:
    """What a layout of one's own is derived from; `--layout` takes it by its name, `auto` never does."""

    def read(self, row: Row, prompts: Sequence[str]) -> dict[str, Any]:
        """Make a plain record of a row, which then goes through every check.

        Args:
            row: Its values, by `row.text(key)`, `row.need(key)`, `row.get(key)`; `row.about()` has id, source and meta.
            prompts: Questions for sets that have only captions.

        Raises:
            RecordError: The row can't be read.
        """
        raise NotImplementedError


def own_layouts() -> list[str]:
    """Names of those that are known."""
    return list(own_classes("layouts"))


def read_by_own(name: str, row: Row, prompts: Sequence[str]) -> dict[str, Any]:
    """Read a row by a layout of one's own; whatever goes wrong in it is said of the record, without its values."""
    fix = "correct the record, or the layout's class"
    try:
        record = own_classes("layouts")[name]().read(row, prompts)
    except RecordError:
        raise
    except Exception as error:  # of code of one's own, for a row that it doesn't expect
        raise RecordError("unknown-layout", f"a row that '{name}' can't read ({type(error).__name__})", fix) from None
    if not isinstance(record, dict):
        raise RecordError("unknown-layout", f"'{name}' made {type(record).__name__} of it, not a mapping", fix)
    return record
