"""Why a record is refused: the rules by name, the error, and the checks that need nothing but the record.

A record is `{id, image, conversations: [{from, value}, ...], system, source, organ, stain, magnification, mpp, meta,
patient, slide}`, of which only `conversations` must be there. Rules about where an image lies are checked in
`images/folder.py`, those about its pixels in `images/file.py`, those about a list of records where it is read. No error
holds the text of a conversation, a file name or an identifier: values are described.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from composer_path.records.image_tags import IMAGE_TAG, lookalikes
from composer_path.records.key_names import (
    NOT_SHOWN,
    flag_meant,
    record_key_meant,
    region_key_meant,
    shown_key,
    turn_key_meant,
)
from composer_path.records.turn_weight import FLAGS, is_weight, weight_of, weights_said

MAX_DEPTH = 64  # levels of objects and lists; no record of the field has ten
MAX_DIGITS = 40  # of a whole number: more than any id or coordinate has, and within what a float can be

RULES = {
    "not-utf8": "the text must be UTF-8",
    "invalid-json": "the file must be a JSON list of records, or JSONL: one whole record on each line",
    "invalid-table": "a table must have named columns, and as many fields in each row",
    "unknown-layout": "a record must be of one layout that is read",
    "unsupported-layout": "a record must hold conversations about pictures, for training",
    "not-an-object": "a record must be a JSON object",
    "duplicate-key": "a key may be given once in an object",
    "bad-number": f"a number must be finite and have no more than {MAX_DIGITS} digits",
    "too-deep": f"objects and lists may lie in each other {MAX_DEPTH} deep",
    "lookalike-key": "a key must be spelled as it is read",
    "missing-key": "a required key is absent",
    "wrong-type": "a value must have the type of its key",
    "duplicate-id": "no two records may share an id",
    "empty-conversation": "a conversation needs a question and an answer",
    "unknown-role": "'from' must be 'human' or 'user', 'assistant' or 'gpt'",
    "tool-turn": "turns of tools are not trained on",
    "truncated-chain": "each step of a chain must be followed by the one it announces",
    "impossible-answer": "a multiple choice's answer must be one of its options",
    "repeated-role": "turns must alternate between 'human' and 'assistant'",
    "no-assistant-turn": "at least one turn must be from 'assistant'",
    "last-turn-not-assistant": "the last turn must be from 'assistant'",
    "empty-answer": "an answer must hold text",
    "tag-in-answer": "<image> may stand in human turns only",
    "tag-in-system": "<image> may not stand in the system message",
    "lookalike-tag": "the place of an image must be written as <image>",
    "contradicting-flags": "the flags of a turn must say the same",
    "loss-on-question": "only answers can be learned",
    "nothing-learned": "an answer at least must be learned",
    "tag-count": "the human turns must hold as many <image> tags as the record has images",
    "path-outside-folder": "an image must lie inside the image folder",
    "missing-file": "an image must be a file in the image folder",
    "unreadable-image": "an image must decode",
    "unsupported-image": "an image must have pixels of a kind that can be shown",
    "too-many-pixels": "an image must not have more pixels than the limit",
    "too-large": "an image must fit in the memory that it may take",
    "too-narrow": "the sides of an image must not differ too much",
    "unknown-level": "a region's level must be one of its slide's",
    "region-outside": "a region must lie on its slide, in part at least",
}


class RecordError(ValueError):
    """A record breaks an input rule.

    Attributes:
        rule: The rule's short name, a key of `RULES`.
        found: What was found, described; never text of a conversation, a file name or an identifier.
        fix: What to do about it.
        where: The place, from the outside in (`record 7 (line 8): conversations[2].from`); may be empty.
    """

    def __init__(self, rule: str, found: str, fix: str, where: str = "") -> None:
        super().__init__(rule, found, fix, where)  # all four, so that the error can be pickled
        self.rule, self.found, self.fix, self.where = rule, found, fix, where

    def at(self, where: str) -> RecordError:
        """The same error with `where` put in front of its place."""
        return type(self)(self.rule, self.found, self.fix, ": ".join(part for part in (where, self.where) if part))

    def __str__(self) -> str:
        """Where, the rule, what was found, what to do, and the rule's name."""
        place = f"{self.where}: " if self.where else ""
        return f"{place}{RULES[self.rule]}, found {self.found}; {self.fix} [{self.rule}]"


class ImageError(RecordError):
    """A picture that can't be used; what was found is said in sizes and formats only, never in metadata."""


# Public sets say 'gpt' or 'user'; everything after this table knows two roles only.
ROLES = {"human": "human", "user": "human", "assistant": "assistant", "gpt": "assistant"}

# JSON can spell characters that have no UTF-8 form.
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

# Role words that may be shown in an error; any other value could be a name or a sentence.
_PRINTABLE_ROLES = {*ROLES, "answer", "bot", "chatgpt", "doctor", "function", "model", "question", "system", "tool"}

# Key -> accepted types and how the error names them. bool is an int in Python, but not a number in JSON.
_STRING, _NAME = ((str,), "a string"), ((str, int), "a string or a whole number")
METADATA_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("source", "organ", "stain"), _STRING),
    "magnification": ((str, int, float), "a string or a number"),
    "mpp": ((int, float), "a number above 0 (micrometres per pixel)"),
    "meta": ((dict,), "an object"),
    **dict.fromkeys(("patient", "slide"), _NAME),
}
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {"id": _NAME, "system": _STRING, **METADATA_TYPES}
# A region of a slide: the least value of each number. Left and top edge may lie outside of the scan.
_REGION_NUMBERS = {"x": None, "y": None, "width": 1, "height": 1, "level": 0}
_REGION_KEYS = ("file", *_REGION_NUMBERS)
_REGION_NAMES = frozenset(_REGION_KEYS)
RECORD_KEYS = frozenset(_TYPES) | {"image", "conversations"}
TURN_KEYS = frozenset(("from", "value", *FLAGS))
_MAX_COORDINATE = 2**31 - 1  # of a slide, pixels


def problems_of(record: object) -> list[RecordError]:
    """List every rule that a record breaks, of those that need no file.

    When the structure is wrong (types, keys, roles) the rules that build on it are not tried.
    """
    if not isinstance(record, dict):
        fix = "write {'id': ..., 'image': ..., 'conversations': [...]}"
        return [RecordError("not-an-object", _describe(record), fix)]
    return [*_type_problems(record)] or [*_turn_problems(record)]


def images_of(record: dict[str, Any]) -> list[Any]:
    """A record's images as a list, whichever way it gives them."""
    image = record.get("image")
    return image if isinstance(image, list) else [] if image is None else [image]


def _type_problems(record: dict[str, Any]) -> Iterator[RecordError]:
    """Wrong types and missing keys; null counts as absent for every optional key."""
    meant = {key: record_key_meant(key, value, record, RECORD_KEYS) for key, value in record.items()}
    yield from (_lookalike_key(key, name) for key, name in meant.items() if name is not None)
    for key in (key for key in FLAGS if record.get(key) not in (None, True)):
        yield RecordError("lookalike-key", f"'{key}', a flag of turns", "give it to each answer, or leave it out")
    for key, (types, expected) in _TYPES.items():
        yield from _value_problems(record.get(key), types, expected, key)
    if isinstance(record.get("meta"), dict):
        yield from _content_problems(record["meta"], "meta")
    mpp = record.get("mpp", 1)
    if isinstance(mpp, int | float) and not isinstance(mpp, bool) and not 0 < mpp < math.inf:
        yield _wrong_type("a number that is not above 0", _TYPES["mpp"][1], "mpp")
    image = record.get("image")
    if isinstance(image, list):
        for index, value in enumerate(image):
            yield from _image_problems(value, f"image[{index}]", "a file name or a region of a slide")
    elif image is not None:
        yield from _image_problems(image, "image", "a file name, a region of a slide, or a list of them")

    turns = record.get("conversations")
    if turns is None:
        yield from () if "conversations" in meant.values() else (_missing_key("conversations"),)
    elif not isinstance(turns, list):
        yield _wrong_type(_describe(turns), "a list of turns", "conversations")
    else:
        for index, turn in enumerate(turns):
            yield from _turn_type_problems(turn, f"conversations[{index}]")


def _image_problems(image: object, where: str, expected: str) -> Iterator[RecordError]:
    """Problems of one image: a file name, or a region {'file', 'x', 'y', 'width', 'height', 'level'} of a slide."""
    if not isinstance(image, dict):
        yield from _value_problems(image, (str,), expected, where, required=True)
        return
    yield from _value_problems(image.get("file"), (str,), "a file name", f"{where}.file")
    for key, least in _REGION_NUMBERS.items():
        value, expected = image.get(key), f"a whole number{'' if least is None else f' of {least} or more'}"
        yield from _value_problems(value, (int,), expected, f"{where}.{key}")
        if isinstance(value, int) and not isinstance(value, bool):
            if least is not None and value < least:
                yield _wrong_type(f"a number below {least}", expected, f"{where}.{key}")
            elif abs(value) > _MAX_COORDINATE:
                yield _wrong_type("a number beyond any slide", expected, f"{where}.{key}")
    others = [key for key in image if key not in _REGION_KEYS]
    meant = [(key, name) for key in others if (name := region_key_meant(key, _REGION_NAMES)) is not None]
    yield from (_lookalike_key(key, name, where) for key, name in meant)
    if missing := [key for key in _REGION_KEYS if key != "level" and image.get(key) is None]:
        yield from (_missing_key(f"{where}.{key}") for key in missing if key not in dict(meant).values())
    if others := sorted({shown_key(key) for key in others} - {shown_key(key) for key, _ in meant}):
        found = f"another key: {', '.join(others)}"
        yield _wrong_type(found, "a region with file, x, y, width, height and level only", where)


def _turn_type_problems(turn: object, where: str) -> Iterator[RecordError]:
    if not isinstance(turn, dict):
        yield _wrong_type(_describe(turn), "an object {'from': ..., 'value': ...}", where)
        return
    meant = {name: key for key in turn if (name := turn_key_meant(key, turn[key], turn, TURN_KEYS)) is not None}
    yield from (_lookalike_key(key, name, where) for name, key in meant.items())
    for key in ("from", "value"):
        place = f"{where}.{key}"
        if key not in turn:
            yield from () if key in meant else (_missing_key(place),)
        else:
            yield from _value_problems(turn[key], *_STRING, place, required=True, empty=True)
    role = turn.get("from")
    if isinstance(role, str) and role not in ROLES:
        found = repr(role) if role.lower() in _PRINTABLE_ROLES else _describe(role)
        fix = "put it under the record's key 'system'" if role.lower() == "system" else "rename the role"
        yield RecordError("unknown-role", found, fix, f"{where}.from")
    yield from _flag_problems(turn, where)


def _flag_problems(turn: dict[str, Any], where: str) -> Iterator[RecordError]:
    """Problems of `loss`, `weight`, `train` and `loss_mask`; null counts as absent."""
    wrong = [flag for flag in FLAGS if turn.get(flag) is not None and not is_weight(turn[flag])]
    for flag in wrong:
        value = turn[flag]
        found = "a number that is none of these" if has_type(value, (int, float)) else _describe(value)
        yield _wrong_type(found, "true, false, or a number from 0 to 1", f"{where}.{flag}")
    if wrong:
        return
    said, role = weights_said(turn), turn.get("from")
    if len(said) > 1:
        found = " and ".join(f"{flag} {float(turn[flag]):g}" for flag in FLAGS if turn.get(flag) is not None)
        yield RecordError("contradicting-flags", found, "keep one of them", where)
    elif said and isinstance(role, str) and ROLES.get(role) == "human" and max(said) > 0:
        fix = "set it to 0, or leave it out of questions"
        yield RecordError("loss-on-question", "a flag that asks for a question's loss", fix, where)


def _turn_problems(record: dict[str, Any]) -> Iterator[RecordError]:
    """Rules about the turns and tags of a record whose types are right."""
    turns = record["conversations"]
    roles = [ROLES[turn["from"]] for turn in turns]
    if not turns:
        yield RecordError("empty-conversation", "no turn", "add turns or leave it out", "conversations")
        return
    if roles == ["assistant"]:
        found = "one assistant turn, and a leading one is dropped"
        yield RecordError("empty-conversation", found, "add the question", "conversations")
        return
    first = int(roles[0] == "assistant")  # a leading one is dropped
    for index in range(1, len(turns)):
        if roles[index] == roles[index - 1]:
            found, fix = f"two {roles[index]!r} turns in a row", "join them or add the missing turn"
            yield RecordError("repeated-role", found, fix, f"conversations[{index}]")
    if "assistant" not in roles:
        found = "1 human turn" if len(turns) == 1 else f"{len(turns)} human turns"
        yield RecordError("no-assistant-turn", found, "add the answer", "conversations")
    elif roles[-1] != "assistant":
        fix = "add the answer or leave the last question out"
        yield RecordError("last-turn-not-assistant", "'human'", fix, f"conversations[{len(turns) - 1}]")

    elif not any(weight_of(turn) for turn in turns[first:] if ROLES[turn["from"]] == "assistant"):
        fix = "give an answer a weight, or leave the record out"
        yield RecordError("nothing-learned", "no answer of a weight above 0", fix, "conversations")

    if isinstance(system := record.get("system"), str):
        if num_in_system := system.count(IMAGE_TAG):
            yield RecordError("tag-in-system", f"{num_in_system} there", "move the tag into a question", "system")
        yield from _lookalike_tags(system, "system")
    num_tags = 0
    for index, (role, turn) in enumerate(zip(roles, turns, strict=True)):
        text, where = turn["value"], f"conversations[{index}].value"
        yield from _lookalike_tags(text, where)
        if role == "human":
            num_tags += text.count(IMAGE_TAG)
            continue
        if IMAGE_TAG in text:
            found = f"{text.count(IMAGE_TAG)} in an answer"
            yield RecordError("tag-in-answer", found, "move the tag into a question", where)
        if index > 0 and not text.strip():  # a leading one is dropped
            found = "blanks only" if text else "an empty string"
            yield RecordError("empty-answer", found, "write the answer or leave the turns out", where)
    num_images = len(images_of(record))
    if num_tags != num_images and not (num_images == 1 and num_tags == 0):
        fix = "give every image its tag, in order (only a single image may go without)"
        yield RecordError("tag-count", f"tags: {num_tags}, images: {num_images}", fix, "conversations")


def _lookalike_tags(text: str, where: str) -> Iterator[RecordError]:
    """At most one problem for each text, with the first of them."""
    if looks := [one.look for one in lookalikes(text)]:
        found = f"{looks[0]}" + (f" and {len(looks) - 1} more" if len(looks) > 1 else "")
        fix = f"write {IMAGE_TAG}, have it read so (--image-tags read), or reword it"
        yield RecordError("lookalike-tag", found, fix, where)


def _content_problems(value: Any, where: str) -> Iterator[RecordError]:
    """The first problem of what lies in a free value: depth, numbers and surrogates, whatever made it."""
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += [*one.keys(), *one.values()]
            elif isinstance(one, list | tuple):
                below += one
            elif isinstance(one, float) and not math.isfinite(one):
                yield RecordError("bad-number", "NaN or Infinity", "write a number, or leave the key out", where)
                return
            elif isinstance(one, int) and abs(one) >= 10**MAX_DIGITS:
                yield RecordError("bad-number", "a longer one", "write it as a string, in quotes", where)
                return
            elif isinstance(one, str) and _LONE_SURROGATE.search(one):
                yield _lone_surrogate(where)
                return
        if not below:
            return
        level = below
    yield RecordError("too-deep", f"more than {MAX_DEPTH} levels", "flatten it, or leave it out", where)


def _value_problems(
    value: object, types: tuple[type, ...], expected: str, where: str, required: bool = False, empty: bool = False
) -> Iterator[RecordError]:
    if value is None and not required:
        return
    if not has_type(value, types):
        yield _wrong_type(_describe(value), expected, where)
    elif value == "" and not empty and where != "system":
        yield _wrong_type("an empty string", expected, where)
    elif isinstance(value, str):
        if _LONE_SURROGATE.search(value):
            yield _lone_surrogate(where)
    elif where != "mpp" and not isinstance(value, dict):  # which have checks of their own
        yield from _content_problems(value, where)


def _lone_surrogate(where: str) -> RecordError:
    fix = "write the character itself or a whole pair of \\u escapes"
    return RecordError("not-utf8", "half of a surrogate pair (a lone \\ud800 to \\udfff)", fix, where)


def _lookalike_key(key: str, meant: str, where: str = "") -> RecordError:
    """A key that stands for another one; named where its name is harmless."""
    shown = shown_key(key)
    found = f"'{shown}'" if shown != NOT_SHOWN else "a key whose name isn't shown"
    fix = f"did you mean '{meant}'? Rename it, or leave it out"
    if meant == "image" and where:
        fix = "give images under the record's key 'image', each with its tag"
    elif meant in FLAGS and flag_meant(key, 0):  # of another name, which may mean the opposite
        fix = f"did you mean '{meant}'? Write it as false or 0 for an answer that is not to be learned, or leave it out"
    return RecordError("lookalike-key", found, fix, where)


def has_type(value: object, types: tuple[type, ...]) -> bool:
    """Whether a JSON value is of a type; true and false are no numbers."""
    return isinstance(value, types) and not isinstance(value, bool)


def _describe(value: object) -> str:
    """Say what a JSON value is without showing it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, str):
        return f"a string of {len(value)} characters"
    return {int: "a number", float: "a number", list: "a list", dict: "an object"}[type(value)]


def _wrong_type(found: str, expected: str, where: str) -> RecordError:
    return RecordError("wrong-type", found, f"'{where}' must be {expected}", where)


def _missing_key(where: str) -> RecordError:
    return RecordError("missing-key", "no such key", f"add '{where.split('.')[-1]}'", where)
