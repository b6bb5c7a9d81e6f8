"""One row of a source file, as a layout reads it: by key, however the key is spelled, noting what was read.

No error holds a value, and of the keys only those that a layout asks for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from composer_path.records.rules import IMAGE_TAG, METADATA_TYPES, RecordError

# Keys by which the files of the field name a picture, and a text about it.
IMAGE_KEYS = ("image", "image_path", "image_file", "filename", "file_name", "img", "img_path")
CAPTION_KEYS = ("caption", "text", "report")

# Of these a record would lose a part of what it shows or asks for.
_UNREAD_MEDIA = ("video", "videos", "audio", "audios")
# What `float` takes beyond this (1_0, other alphabets' digits, "infinity") is a slip.
_NUMBER = re.compile(r"\s*[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?\s*")
_NOT_IN_KEYS = re.compile(r"[\W_]+")


def plain_key(key: str) -> str:
    """Return a key without case, blanks and signs: `Choice A`, `choice_a` and `choiceA` are one."""
    return _NOT_IN_KEYS.sub("", key).casefold()


def number_of(text: str) -> float | None:
    """Return the finite number that a text is, or None."""
    number = float(text) if _NUMBER.fullmatch(text) else math.nan
    return number if math.isfinite(number) else None


class Row:
    """A row's values by key; null counts as absent, and so does an empty field of a table.

    Attributes:
        embedded: Bytes of the pictures that lie in the row itself, by the names that stand for them in the record.
        layout: The name of the layout that it was read by, once it is.
    """

    def __init__(self, values: Mapping[str, Any], position: int | None = None) -> None:
        self.values = values
        self.embedded: dict[str, bytes] = {}
        self.layout = ""
        self._position = position
        self._read: set[str] = set()
        self._names: dict[str, list[str]] = {}
        for name, value in values.items():
            if value is not None:
                self._names.setdefault(plain_key(name), []).append(name)

    def has(self, *keys: str) -> bool:
        """Whether one of these keys has a value."""
        return any(plain_key(key) in self._names for key in keys)

    def get(self, *keys: str) -> Any:
        """Return the value of the only one of these keys that has one, or None.

        Several that say the same are one; several that differ are an error, as one of them would be passed over.
        """
        found = {name: self.values[name] for key in keys for name in self._names.get(plain_key(key), [])}
        self._read.update(found)
        values = list(found.values())
        if any(value != values[0] for value in values[1:]):
            named = " and ".join(f"'{key}'" for key in keys if self.has(key))
            raise RecordError("unknown-layout", f"several values that differ under {named}", "leave one of them")
        return values[0] if values else None

    def need(self, *keys: str) -> Any:
        """Return the value of the only one of these keys that has one; an error if none has."""
        if (value := self.get(*keys)) is None:
            raise RecordError("missing-key", "no such key, or nothing in it", f"add '{keys[0]}'", keys[0])
        return value

    def text(self, *keys: str) -> str:
        """Return a text; an error if there is none under these keys, or something else."""
        value = self.need(*keys)
        if not isinstance(value, str):
            raise wrong_type(keys[0], "a string")
        return value

    def pictures(self, *keys: str) -> list[Any]:
        """Return the pictures under one of these keys as a record names them: files and regions of slides."""
        value = self.get(*keys)
        values = value if isinstance(value, list) else [] if value is None else [value]
        return [self.picture(one, keys[0]) for one in values]

    def picture(self, value: Any, where: str) -> Any:
        """Return one picture as a record names it; bytes in the row get a name."""
        if isinstance(value, dict) and value.keys() & {"bytes", "path", "url"} and "file" not in value:
            data, name = value.get("bytes"), value.get("path") or value.get("url")
            if data is None:
                return name if isinstance(name, str) else _refuse_picture(where)
            return self.embed(data, where, name)
        return self.embed(value, where) if isinstance(value, bytes) else value

    def embed(self, data: Any, where: str, name: Any = None) -> str:
        """Note a picture that lies in the row itself, and return the name that stands for it."""
        if not isinstance(data, bytes) or not data:
            _refuse_picture(where)
        if not isinstance(name, str) or not name or self.embedded.get(name, data) != data:
            name = f"picture {len(self.embedded) + 1} of record {self._position}"
        self.embedded[name] = data
        return name

    def about(self, source: str | None = None) -> dict[str, Any]:
        """Return what the row says of itself under a record's own keys, `source` standing for one that isn't given."""
        found = {key: self.get(key) for key in ("id", *METADATA_TYPES) if self.has(key)}
        if isinstance(found.get("mpp"), str):  # a table has strings only
            found["mpp"] = number_of(found["mpp"])
            if found["mpp"] is None:
                raise wrong_type("mpp", "a number above 0 (micrometres per pixel)")
        return found if source is None else {"source": source, **found}

    def refuse_media(self) -> None:
        """Refuse a row that holds moving pictures or sound."""
        for key in _UNREAD_MEDIA:
            if self.has(key) and self.get(key) not in ([], ""):
                raise RecordError("unsupported-layout", f"a key '{key}'", "leave such records out")

    def mark(self, *keys: str) -> None:
        """Note keys as read that a layout has looked at by itself."""
        self._read.update(name for key in keys for name in self._names.get(plain_key(key), []))

    @property
    def ignored(self) -> tuple[str, ...]:
        """Keys with a value that nothing has read."""
        return tuple(name for names in self._names.values() for name in names if name not in self._read)


def wrong_type(where: str, expected: str) -> RecordError:
    """Say that something of a row isn't of the type that its layout asks for."""
    return RecordError("wrong-type", "something else", f"'{where}' must be {expected}", where)


def asked(images: Sequence[Any], question: str, answer: str) -> dict[str, Any]:
    """Return what a record holds of one question about pictures and its answer."""
    tags = f"{IMAGE_TAG}\n" * len(images)
    turns = [{"from": "human", "value": tags + question}, {"from": "gpt", "value": answer}]
    return {"image": list(images) if len(images) != 1 else images[0], "conversations": turns}


def untagged(text: str, where: str) -> str:
    """Return a text of a layout that has no tags of its own; one in it would stand for a picture that isn't there."""
    if IMAGE_TAG in text:
        raise RecordError("tag-count", f"{IMAGE_TAG} in a text of a layout without tags", "take it out", where)
    return text


def _refuse_picture(where: str) -> Any:
    found = "neither bytes nor a file's name"
    raise RecordError("missing-file", found, "store the picture's bytes, or name a file", where)
