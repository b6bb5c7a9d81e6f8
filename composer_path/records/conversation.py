"""One record of the input JSON, checked and turned into a conversation: every input rule lives here.

A record is ``{id, image, conversations: [{from, value}, ...], system, source, organ, stain, magnification,
mpp, meta, patient, slide}``, of which only ``conversations`` must be there. ``problems_of`` applies the rules
that need nothing but the record, ``resolve_image`` those about where a file lies. No error holds the text of
a conversation, a file name or an identifier: values are described.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from composer_path.records.rules import RULES, RecordError
from composer_path.records.slide_region import SlideRegion

__all__ = [
    "IMAGE_TAG",
    "RECORD_KEYS",
    "ROLES",
    "RULES",
    "Conversation",
    "RecordError",
    "Turn",
    "id_of",
    "problems_of",
    "resolve_image",
]

IMAGE_TAG = "<image>"

# Public sets say 'gpt' or 'user'; everything after this table knows two roles only.
ROLES = {"human": "human", "user": "human", "assistant": "assistant", "gpt": "assistant"}

# JSON can spell characters that have no UTF-8 form.
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

# Role words that may be shown in an error; any other value could be a name or a sentence.
_PRINTABLE_ROLES = {
    *ROLES,
    "answer",
    "bot",
    "chatgpt",
    "doctor",
    "function",
    "model",
    "question",
    "system",
    "tool",
}


@dataclass(frozen=True)
class Turn:
    """One turn: ``role`` is 'human' or 'assistant'; ``text`` is as given, with its image tags."""

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """A checked conversation; the n-th ``<image>`` tag of its human turns is the n-th image.

    Built by ``from_record`` for training. For asking a model, build it directly with a last human turn.

    Attributes:
        turns: alternating human and assistant turns, human first.
        images: file names under the image folder, or regions of slides there; empty strings when the conversation
            was read from a shard.
        system: system message of this record, or None for the prompt template's own.
        id: the record's id, or None.
        metadata: those given of source, organ, stain, magnification, mpp, meta, patient, slide.
        dropped_turns: leading assistant turns that were dropped, as the reference does (0 or 1).
        image_without_tag: the record had one image and no tag; a tag was put before the first question.
    """

    turns: tuple[Turn, ...]
    images: tuple[str | SlideRegion, ...] = ()
    system: str | None = None
    id: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    dropped_turns: int = 0
    image_without_tag: bool = False

    @classmethod
    def from_record(cls, record: object) -> Conversation:
        """Check a record against every rule that needs no file and build its conversation.

        Args:
            record: one element of the input list, as ``json.loads`` gives it.

        Raises:
            RecordError: the first rule that is broken; ``problems_of`` lists all of them.
        """
        problems = problems_of(record)
        if problems:
            raise problems[0]
        assert isinstance(record, dict)
        turns = [Turn(ROLES[turn["from"]], turn["value"]) for turn in record["conversations"]]
        dropped_turns = int(turns[0].role == "assistant")
        turns = turns[dropped_turns:]
        images = _images(record)
        image_without_tag = len(images) == 1 and _num_tags(turns) == 0
        if image_without_tag:
            turns[0] = Turn("human", f"{IMAGE_TAG}\n{turns[0].text}")
        metadata = {key: record[key] for key in _METADATA_TYPES if record.get(key) is not None}
        for key in ("patient", "slide"):
            if key in metadata:
                metadata[key] = str(metadata[key])
        return cls(
            turns=tuple(turns),
            images=images,
            system=record.get("system"),
            id=id_of(record),
            metadata=metadata,
            dropped_turns=dropped_turns,
            image_without_tag=image_without_tag,
        )

    @property
    def num_images(self) -> int:
        """Number of images, which is the number of tags."""
        return len(self.images)

    def to_shard(self) -> dict[str, Any]:
        """Return what a shard's ``conversation`` column holds: turns and system message."""
        return {"turns": [[turn.role, turn.text] for turn in self.turns], "system": self.system}

    @classmethod
    def from_shard(cls, data: Mapping[str, Any], num_images: int) -> Conversation:
        """Build the conversation of a shard's sample; its images have no names there.

        Args:
            data: the ``conversation`` column, as ``to_shard`` wrote it.
            num_images: number of images in the sample's ``images`` column.

        Raises:
            ValueError: tags and images differ in number, so the shard wasn't written by ``convert``.
        """
        turns = [Turn(role, text) for role, text in data["turns"]]
        num_tags = _num_tags(turns)
        if num_tags != num_images:
            raise ValueError(
                f"a sample of a shard must have one image for each {IMAGE_TAG} tag, "
                f"found {num_tags} tags and {num_images} images; convert the data again"
            )
        return cls(turns=tuple(turns), images=("",) * num_images, system=data.get("system"))


# Key -> accepted types and how the error names them. bool is an int in Python, but not a number in JSON.
_METADATA_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "source": ((str,), "a string"),
    "organ": ((str,), "a string"),
    "stain": ((str,), "a string"),
    "magnification": ((str, int, float), "a string or a number"),
    "mpp": ((int, float), "a number above 0 (micrometres per pixel)"),
    "meta": ((dict,), "an object"),
    "patient": ((str, int), "a string or a whole number"),
    "slide": ((str, int), "a string or a whole number"),
}
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "id": ((str, int), "a string or a whole number"),
    "system": ((str,), "a string"),
    **_METADATA_TYPES,
}
# A region of a slide: the least value of each number. Left and top edge may lie outside of the scan.
_REGION_NUMBERS = {"x": None, "y": None, "width": 1, "height": 1, "level": 0}
_REGION_KEYS = ("file", *_REGION_NUMBERS)
RECORD_KEYS = frozenset(_TYPES) | {"image", "conversations"}


def problems_of(record: object) -> list[RecordError]:
    """List every rule that a record breaks, of those that need no file.

    When the structure is wrong (types, keys, roles) the rules that build on it are not tried.
    """
    if not isinstance(record, dict):
        fix = "write {'id': ..., 'image': ..., 'conversations': [...]}"
        return [RecordError("not-an-object", _describe(record), fix)]
    problems = [*_type_problems(record)]
    return problems or [*_turn_problems(record)]


def id_of(record: object) -> str | None:
    """Return a record's id as text (public sets also number them), or None if it has no usable one."""
    value = record.get("id") if isinstance(record, dict) else None
    return str(value) if _has_type(value, (str, int)) and value != "" else None


def resolve_image(name: str, images_dir: str | Path) -> Path:
    """Find an image's file, refusing every name that leads out of the image folder.

    Args:
        name: path relative to the image folder, as the record gives it.
        images_dir: the image folder; it may itself be a symbolic link.

    Returns:
        The file's path with all symbolic links followed.

    Raises:
        RecordError: 'path-outside-folder' or 'missing-file'.
    """
    fix = "name the file relative to the image folder and keep it inside"
    if name.startswith("/") or PureWindowsPath(name).drive:
        raise RecordError("path-outside-folder", "an absolute path", fix)
    if ".." in name.replace("\\", "/").split("/"):
        raise RecordError("path-outside-folder", "'..' in its path", fix)
    fix = "check the name and the image folder"
    try:
        folder = Path(images_dir).resolve()
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):
            fix = "copy the file into the folder"
            raise RecordError("path-outside-folder", "a symbolic link that leads out", fix)
        if path.is_file():
            return path
        found = "a folder" if path.is_dir() else "something else" if path.exists() else "no such file"
    except (OSError, RuntimeError):  # a name that is too long, a link that leads to itself
        found = "a path that the file system refuses"
    except RecordError:
        raise
    except ValueError:
        found = "a name with a null character"
    raise RecordError("missing-file", found, fix)


def _type_problems(record: dict[str, Any]) -> Iterator[RecordError]:
    """Wrong types and missing keys; null counts as absent for every optional key."""
    for key, (types, expected) in _TYPES.items():
        yield from _value_problems(record.get(key), types, expected, key)
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
        yield _missing_key("conversations")
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
        if isinstance(value, int) and not isinstance(value, bool) and least is not None and value < least:
            yield _wrong_type(f"a number below {least}", expected, f"{where}.{key}")
    yield from (_missing_key(f"{where}.{key}") for key in _REGION_KEYS if key != "level" and image.get(key) is None)
    if num_others := len(image.keys() - set(_REGION_KEYS)):
        yield _wrong_type(f"{num_others} other keys", "a region with file, x, y, width, height and level only", where)


def _turn_type_problems(turn: object, where: str) -> Iterator[RecordError]:
    if not isinstance(turn, dict):
        yield _wrong_type(_describe(turn), "an object {'from': ..., 'value': ...}", where)
        return
    for key in ("from", "value"):
        if key not in turn:
            yield _missing_key(f"{where}.{key}")
        else:
            place = f"{where}.{key}"
            yield from _value_problems(turn[key], (str,), "a string", place, required=True, empty=True)
    role = turn.get("from")
    if isinstance(role, str) and role not in ROLES:
        known = role if role.lower() in _PRINTABLE_ROLES else ""
        fix = "put it under the record's key 'system'" if known.lower() == "system" else "rename the role"
        yield RecordError("unknown-role", repr(known) if known else _describe(role), fix, f"{where}.from")


def _turn_problems(record: dict[str, Any]) -> Iterator[RecordError]:
    """Rules about the turns and tags of a record whose types are right."""
    turns = [Turn(ROLES[turn["from"]], turn["value"]) for turn in record["conversations"]]
    roles = [turn.role for turn in turns]
    if not turns:
        yield RecordError("empty-conversation", "no turn", "add turns or leave it out", "conversations")
        return
    if roles == ["assistant"]:
        found = "one assistant turn, and a leading one is dropped"
        yield RecordError("empty-conversation", found, "add the question", "conversations")
        return
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

    leading = int(roles[0] == "assistant")
    for index, turn in enumerate(turns):
        where = f"conversations[{index}].value"
        if turn.role == "human":
            continue
        if IMAGE_TAG in turn.text:
            found = f"{turn.text.count(IMAGE_TAG)} in an answer"
            yield RecordError("tag-in-answer", found, "move the tag into a question", where)
        if index >= leading and not turn.text.strip():
            found = "blanks only" if turn.text else "an empty string"
            yield RecordError("empty-answer", found, "write the answer or leave the turns out", where)
    num_images, num_tags = len(_images(record)), _num_tags(turns)
    if num_tags != num_images and not (num_images == 1 and num_tags == 0):
        fix = "give every image its tag, in order (only a single image may go without)"
        yield RecordError("tag-count", f"tags: {num_tags}, images: {num_images}", fix, "conversations")


def _value_problems(
    value: object,
    types: tuple[type, ...],
    expected: str,
    where: str,
    required: bool = False,
    empty: bool = False,
) -> Iterator[RecordError]:
    if value is None and not required:
        return
    if not _has_type(value, types):
        yield _wrong_type(_describe(value), expected, where)
    elif value == "" and not empty and where != "system":
        yield _wrong_type("an empty string", expected, where)
    elif _LONE_SURROGATE.search(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)):
        fix = "write the character itself or a whole pair of \\u escapes"
        yield RecordError("not-utf8", "half of a surrogate pair (a lone \\ud800 to \\udfff)", fix, where)


def _has_type(value: object, types: tuple[type, ...]) -> bool:
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


def _images(record: dict[str, Any]) -> tuple[str | SlideRegion, ...]:
    image = record.get("image")
    images = image if isinstance(image, list) else [] if image is None else [image]
    return tuple(SlideRegion.from_record(value) if isinstance(value, dict) else value for value in images)


def _num_tags(turns: list[Turn]) -> int:
    return sum(turn.text.count(IMAGE_TAG) for turn in turns if turn.role == "human")
