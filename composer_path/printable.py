"""Text of others as a terminal or a log may show it: what steers one, or turns its direction, is escaped."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""A text on one line, in which control codes, bidi overrides and the like stand as `\x1b` or `\u202e`."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def printable_lines(text: str) -> str:
    """The same of a text of several lines, which stay, as tabs do."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


def _escaped(letter: str) -> str:
    return letter if letter.isprintable() else ascii(letter)[1:-1]
