"""The error for a picture that can't be used."""

from __future__ import annotations


class ImageError(ValueError):
    """A picture that can't be used.

    Attributes:
        rule: Short name of the rule, e.g. `unreadable-image`.
        found: What was found, in sizes and formats only: never metadata nor a name from inside the file.
        fix: What to do about it.
    """

    def __init__(self, rule: str, found: str = "", fix: str = "") -> None:
        super().__init__(rule, found, fix)  # all three, so that the error survives pickling between workers
        self.rule, self.found, self.fix = rule, found, fix

    def __str__(self) -> str:
        found = f": found {self.found}" if self.found else ""
        return f"{self.rule}{found}{'; ' + self.fix if self.fix else ''}"
