"""How a file of records is to be read: the layout, the questions for captions, and which rows are taken."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from composer_path.layouts.condition import Condition
from composer_path.layouts.registry import read_row
from composer_path.layouts.row import Row
from composer_path.records.rules import RecordError

CAPTION_PROMPT = "Describe this image."


@dataclass(frozen=True)
class LeftOut:
    """A row that isn't wanted, and why; no problem, but counted."""

    why: str


@dataclass(frozen=True)
class Reading:
    """What is done with each row before any rule is tried.

    Attributes:
        layout: A name of `LAYOUTS`, or `auto`.
        caption_prompts: What the question is where a set has only captions; of several the caption decides which.
        where: Conditions that a row must keep, see `Condition.parse`.
    """

    layout: str = "auto"
    caption_prompts: tuple[str, ...] = (CAPTION_PROMPT,)
    where: tuple[str, ...] = ()

    @cached_property
    def conditions(self) -> tuple[Condition, ...]:
        """The conditions, understood."""
        return tuple(map(Condition.parse, self.where))

    def record(self, values: Any, position: int | None, layout: str | None = None) -> tuple[Any, Row]:
        """Return a row's plain record, or why there is none, and the row, which knows what was read and how.

        `layout` is what the whole file is known to have.
        """
        if not isinstance(values, dict):
            return values, Row({}, position)  # the rules say what it should be
        row = Row(values, position)
        try:
            record = read_row(row, layout or self.layout, self.caption_prompts)
            for condition in self.conditions:
                if (why := condition.why_left_out(row, record.get("image"))) is not None:
                    return LeftOut(why), row
        except RecordError as error:
            return error, row
        return record, row

    def fingerprint(self) -> dict[str, Any]:
        """Return what of it shapes a set: what differs from the defaults."""
        shaping: dict[str, Any] = {}
        if self.layout != "auto":
            shaping["layout"] = self.layout
        if self.caption_prompts != (CAPTION_PROMPT,):
            shaping["caption_prompts"] = list(self.caption_prompts)
        if self.where:
            shaping["where"] = [condition.fingerprint() for condition in self.conditions]
        return shaping


DEFAULT = Reading()
