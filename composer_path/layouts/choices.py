"""Multiple choice: how question and options become one question, and the right option the answer.

The question stands first, then each option on a line of its own after its letter; the answer is the right one's line:

    Which tissue is shown?
    A. Colon
    B. Lung

    B. Lung
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from composer_path.records.rules import RecordError

_LABEL = re.compile(r"\s*\(?([A-Za-z])\s*[.):]\s*(?=\S)")
_LETTER = re.compile(r"\s*\(?([A-Za-z])\s*[.):]?\s*")


def put_together(question: str, options: Sequence[str], *answers: str | None) -> tuple[str, str]:
    """Return question and answer as texts.

    Args:
        question: Without options.
        options: In order; those that all begin with their own letters (`A)`, `(B)`, `C:`) lose it.
        answers: What says which one is right: its letter, its text, or both in one. All given must agree.
    """
    labelled = list(options)
    options = [text.strip() for text in _without_labels(options)]
    if not 2 <= len(options) <= len(string.ascii_uppercase) or not all(options):
        found = f"{len(options)} options" + ("" if all(options) else ", an empty one among them")
        raise RecordError("impossible-answer", found, "give each question two to 26 options, none empty", "options")
    if len({_folded(text) for text in options}) < len(options):
        raise RecordError("impossible-answer", "an option that comes twice", "leave one of them out", "options")
    given = [answer for answer in answers if answer is not None and answer.strip()]
    if not given:
        raise RecordError("impossible-answer", "no answer", "say which option is right", "answer")
    right = {_index_of(answer, options, labelled) for answer in given}
    if len(right) > 1:
        raise RecordError("impossible-answer", "a letter and a text of different options", "correct one", "answer")
    lines = [f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, options, strict=False)]
    return "\n".join([question.strip(), *lines]), lines[right.pop()]


def _index_of(answer: str, options: Sequence[str], labelled: Sequence[str]) -> int:
    """Return which option an answer means: first as a text, as options may be letters themselves."""
    for texts in (labelled, options):
        found = [index for index, text in enumerate(texts) if _folded(text) == _folded(answer)]
        if len(found) == 1:
            return found[0]
    if match := _LETTER.fullmatch(answer):
        index = string.ascii_uppercase.index(match[1].upper())
        if index < len(options):
            return index
        found_text = f"the letter of option {index + 1} of {len(options)}"
        raise RecordError("impossible-answer", found_text, "give the letter of an option", "answer")
    if match := _LABEL.match(answer):
        index = string.ascii_uppercase.index(match[1].upper())
        if index < len(options) and _folded(answer[match.end() :]) == _folded(options[index]):
            return index
    raise RecordError("impossible-answer", "no option's letter or text", "give one of the options", "answer")


def _without_labels(options: Sequence[str]) -> list[str]:
    """Take the letters off, if each option has its own."""
    matches = [_LABEL.match(option) for option in options]
    letters = [match[1].upper() for match in matches if match is not None]
    if letters != list(string.ascii_uppercase[: len(options)]):
        return list(options)
    return [option[match.end() :] for option, match in zip(options, matches, strict=True) if match is not None]


def _folded(text: str) -> str:
    return re.sub(r"\s+", " ", text.strip().rstrip(".").casefold())
