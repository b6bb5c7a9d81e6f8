"""The error of a record that breaks an input rule, and the rules by name."""

from __future__ import annotations

RULES = {
    "not-utf8": "the text must be UTF-8",
    "invalid-json": "the file must be a JSON list of records, or JSONL: one whole record on each line",
    "not-an-object": "a record must be a JSON object",
    "missing-key": "a required key is absent",
    "wrong-type": "a value must have the type of its key",
    "duplicate-id": "no two records may share an id",
    "empty-conversation": "a conversation needs a question and an answer",
    "unknown-role": "'from' must be 'human' or 'user', 'assistant' or 'gpt'",
    "repeated-role": "turns must alternate between 'human' and 'assistant'",
    "no-assistant-turn": "at least one turn must be from 'assistant'",
    "last-turn-not-assistant": "the last turn must be from 'assistant'",
    "empty-answer": "an answer must hold text",
    "tag-in-answer": "<image> may stand in human turns only",
    "tag-count": "the human turns must hold as many <image> tags as the record has images",
    "path-outside-folder": "an image must lie inside the image folder",
    "missing-file": "an image must be a file in the image folder",
    "unreadable-image": "an image must decode",
    "unsupported-image": "an image must have pixels of a kind that can be shown",
    "too-many-pixels": "an image must not have more pixels than the limit",
    "too-narrow": "the sides of an image must not differ too much",
    "unknown-level": "a region's level must be one of its slide's",
    "region-outside": "a region must lie on its slide, in part at least",
}


class RecordError(ValueError):
    """A record breaks an input rule.

    Attributes:
        rule: the rule's short name, a key of ``RULES``.
        found: what was found, described; never text of a conversation, a file name or an identifier.
        fix: what to do about it.
        where: the place, from the outside in (``record 7 (line 8): conversations[2].from``); may be empty.
    """

    def __init__(self, rule: str, found: str, fix: str, where: str = "") -> None:
        super().__init__(rule, found, fix, where)  # all four, so that the error can be pickled
        self.rule, self.found, self.fix, self.where = rule, found, fix, where

    def at(self, where: str) -> RecordError:
        """Return the same error with ``where`` put in front of its place."""
        place = ": ".join(part for part in (where, self.where) if part)
        return RecordError(self.rule, self.found, self.fix, place)

    def __str__(self) -> str:
        """Where, the rule, what was found, what to do, and the rule's name."""
        place = f"{self.where}: " if self.where else ""
        return f"{place}{RULES[self.rule]}, found {self.found}; {self.fix} [{self.rule}]"
