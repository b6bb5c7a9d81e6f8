"""The image tag, and what people write for it: such text must not be trained on as text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

IMAGE_TAG = "<image>"
_AS_TEXT = "<\0image>"  # how a turn holds the tag where it is text and stands for no image

_WORD = r"(?:image|img|picture|pic|photo)"
# What may be read as the tag: brackets around one of those words, perhaps with a number or a word like 'placeholder'.
_TAIL = r"s?(?:[ _-]?(?:token|placeholder|pad|here|file))?(?:[ _-]?(?P<number{}>\d{{1,3}}))?"
_READABLE = (
    rf"<\s*\|?\s*{_WORD}{_TAIL.format(0)}\s*\|?\s*/?\s*>",
    rf"\[\s*(?:image|img){_TAIL.format(1)}\s*\]",
    rf"\{{+\s*(?:image|img){_TAIL.format(2)}\s*\}}+",
    rf"&lt;\s*{_WORD}{_TAIL.format(3)}\s*/?\s*&gt;",
)
_ONLY_REFUSED = (
    r"<\s*[|/]?\s*[\w:.-]*(?:image|img|picture|photo)[\w:.-]*\s*[|/]?\s*>",  # </image>, <start_of_image>
    rf"</?\s*\|?\s*(?:{_WORD}|video|audio|im_patch)s?(?![a-z\d])[^<>]{{0,200}}>?",
    r"<\s*/?\s*\|?_*(?:media|vision|visual)(?:[ _-]?(?:start|end|begin|pad|token|embed|feature)s?)?_*\|?\s*/?\s*>",
    r"\bdata:image/[\w.+-]{1,20}(?:;[\w=-]{1,20})*,",  # a picture as text
    r"<\s*/?\s*im_(?:start|end)\s*>",
    r"\[/?\s*img[\w-]*\s*\]",
    r"&lt;\s*/?\s*(?:image|img)\b",
    r"!\[[^\]\n]{0,200}\]\([^)\n]{0,2000}\)",  # Markdown
)
_NAMED = [f"(?P<readable{n}>{one})" for n, one in enumerate(_READABLE)]
_LOOKALIKE = re.compile("|".join((*_NAMED, *_ONLY_REFUSED)), re.I)
_SHOWN = re.compile(rf"[<\[{{|/ ]*{_WORD}s?[ _-]?(?:token|placeholder|pad|here|file)?[ _-]?\d{{0,2}}[|/ \]}}>]*", re.I)
_OPENINGS = re.compile(r"[<\[{]|&lt;|data:", re.I)
# Letters and brackets of other widths and alphabets, and marks without width, that make a tag look like the tag.
_ODD = re.compile(
    "[\u00ad\u0131\u0261\u0430\u0435\u0456\u200b-\u200f\u2039\u2060-\u2064\u2329\u27e8\u3008\u300a\ufe64\ufeff"
    "\uff1c\uff21-\uff3a\uff3b\uff41-\uff5a\uff5b\U0001d400-\U0001d7ff]"
)
_ALIKE = {
    **dict.fromkeys("\u2039\u2329\u27e8\u3008\u300a", "<"),
    **dict.fromkeys("\u203a\u232a\u27e9\u3009\u300b", ">"),
    **{"\u0430": "a", "\u0435": "e", "\u0456": "i", "\u0131": "i", "\u0261": "g"},
}


def tag_as_text(text: str) -> str:
    """A text for a turn, in which `<image>` is text; it must hold no NUL."""
    return text.replace(IMAGE_TAG, _AS_TEXT)


def as_written(text: str) -> str:
    """A piece between a turn's tags as it was written, what `tag_as_text` hid included."""
    return text.replace(_AS_TEXT, IMAGE_TAG)


@dataclass(frozen=True)
class Lookalike:
    """What stands in a text where `<image>` may be meant.

    Attributes:
        start: Its first letter.
        end: The letter after its last one.
        look: As it may be shown, which never holds a name.
        readable: It may be read as the tag.
        number: Of its picture, as in `<image_1>`.
    """

    start: int
    end: int
    look: str
    readable: bool
    number: int | None


def lookalikes(text: str) -> Iterator[Lookalike]:
    """Yield all that look like the tag and are not, in order."""
    plain, places = text, None
    if not text.isascii() and (_ODD.search(text) or not unicodedata.is_normalized("NFKC", text)):
        plain, places = _in_ascii(text)
    if not _OPENINGS.search(plain):
        return
    for match in _LOOKALIKE.finditer(plain):
        start, end = match.span() if places is None else (places[match.start()], places[match.end()])
        if text[start:end] == IMAGE_TAG:
            continue
        groups = match.groupdict()
        readable = any(groups[f"readable{n}"] for n in range(len(_READABLE)))
        number = next((groups[f"number{n}"] for n in range(len(_READABLE)) if groups[f"number{n}"]), None)
        look = match[0] if _SHOWN.fullmatch(match[0]) else "a tag of another kind"
        look = "a tag of odd letters" if look == IMAGE_TAG else look
        yield Lookalike(start, end, look, readable, None if number is None else int(number))


def read_image_tags(record: Any) -> Any:
    """A record in which readable lookalikes in questions are the tag; what is no record of turns stays as it is.

    Numbered ones must come in order, once each: a second `<image_1>` is no further image. Otherwise they stay.
    """
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list):
        return record
    found: dict[int, list[Lookalike]] = {}
    for index, turn in enumerate(turns):
        if isinstance(turn, dict) and turn.get("from") in ("human", "user") and isinstance(turn.get("value"), str):
            found[index] = [one for one in lookalikes(turn["value"]) if one.readable]
    numbers = [one.number for some in found.values() for one in some if one.number is not None]
    if numbers and numbers not in ([*range(len(numbers))], [*range(1, len(numbers) + 1)]):
        return record
    turns = [
        {**turn, "value": _read(turn["value"], found[index])} if found.get(index) else turn
        for index, turn in enumerate(turns)
    ]
    return {**record, "conversations": turns}


def _read(text: str, tags: list[Lookalike]) -> str:
    ends = [0, *(tag.end for tag in tags)]
    starts = [*(tag.start for tag in tags), len(text)]
    return IMAGE_TAG.join(text[end:start] for end, start in zip(ends, starts, strict=True))


def _in_ascii(text: str) -> tuple[str, list[int]]:
    """A text with its odd letters as the plain ones that they look like, and where each of them stands in it."""
    letters: list[str] = []
    places: list[int] = []
    for place, letter in enumerate(text):
        plain = "" if unicodedata.category(letter) == "Cf" else unicodedata.normalize("NFKC", letter)
        letters.append(_ALIKE.get(letter, plain))
        places += [place] * len(letters[-1])
    return "".join(letters), [*places, len(text)]
