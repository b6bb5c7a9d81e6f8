"""Messages `{role, content}`, as OpenAI's interface and chat templates have them, become turns over images.

A message's parts stand on lines of their own, as in records of messages (`layouts/conversations.py`). An image part is
the tag; a tag or special token that a text part spells out is text. Where a user's content is a string, its tags are
tags, as in a record.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from composer_path.records.conversation import Conversation, Turn
from composer_path.records.image_tags import IMAGE_TAG, tag_as_text

# What parts of a content are called.
TEXT_PARTS, IMAGE_PARTS = ("text", "input_text"), ("image", "image_url", "input_image")
_ROLES = {"user": "human", "assistant": "assistant"}
_SYSTEM = ("system", "developer")
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")
_LONE = re.compile("[\ud800-\udfff]")


class MessageError(ValueError):
    """Messages that can't be asked; says where and the rule, never a text.

    Attributes:
        where: The place, such as `messages[2].content`.
    """

    def __init__(self, where: str, rule: str, found: str, fix: str) -> None:
        super().__init__(f"{where}: {rule}; found {found}; {fix}")
        self.where = where


@dataclass(frozen=True)
class Asked:
    """What messages ask.

    Attributes:
        turns: Of user and assistant, alternating, with the tags of their images.
        system: What the first message says, if it is the system's.
        pictures: What each image part holds, without its type, in the order of the tags; none for tags of a string.
    """

    turns: tuple[Turn, ...]
    system: str | None
    pictures: tuple[Mapping[str, Any], ...]


def read_messages(messages: Any) -> Asked:
    """Read messages; they may end with a question or with an answer.

    Raises:
        MessageError: They aren't such messages, or hold what no conversation of ours has (tools, sound, names).
    """
    if not isinstance(messages, list | tuple) or not messages:
        found = "an empty list" if isinstance(messages, list | tuple) else "something else"
        raise MessageError("messages", "must be a list of messages", found, "give [{'role': 'user', 'content': ...}]")
    system: str | None = None
    turns: list[Turn] = []
    pictures: list[Mapping[str, Any]] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role, content = _fields(message, where)
        if role in _SYSTEM and index == 0:
            system = _text(content, f"{where}.content", None, "")
            continue
        if role not in _ROLES:
            found = "a later system message" if role in _SYSTEM else "another role"
            raise MessageError(f"{where}.role", "must be user or assistant, or first system", found, "rename it")
        if _ROLES[role] == (turns[-1].role if turns else "assistant"):
            rule = "user and assistant must take turns, the user first"
            raise MessageError(
                f"{where}.role", rule, f"another message of the {role}", "join the two, or leave one out"
            )
        turns.append(Turn(_ROLES[role], _text(content, f"{where}.content", pictures, role)))
    if not turns:
        raise MessageError("messages", "must hold a question", "a system message only", "add a message of the user")
    if pictures and sum(turn.text.count(IMAGE_TAG) for turn in turns if turn.role == "human") != len(pictures):
        rule = f"{IMAGE_TAG} in a string must not stand beside image parts"
        raise MessageError("messages", rule, "both", "make the string a part of type text, or the parts strings")
    return Asked(tuple(turns), system, tuple(pictures))


def conversation_of(turns: Sequence[Turn], num_images: int, system: str | None = None) -> Conversation:
    """A conversation about images; where no question has a tag, they stand before the first.

    Raises:
        MessageError: A text that no tokenizer can read.
    """
    told = list(turns)
    if any(_LONE.search(text) for text in (system or "", *(turn.text for turn in told))):
        raise MessageError("the conversation", "must be text that UTF-8 can hold", "another character", "take it out")
    if num_images and not any(IMAGE_TAG in turn.text for turn in told if turn.role == "human"):
        told[0] = Turn(told[0].role, f"{IMAGE_TAG}\n" * num_images + told[0].text)
    return Conversation(turns=tuple(told), images=("",) * num_images, system=system)


def _fields(message: Any, where: str) -> tuple[Any, Any]:
    """Role and content of a message; nothing else may be asked of it."""
    if not isinstance(message, Mapping):
        raise MessageError(where, "must be an object {'role', 'content'}", "something else", "write it as one")
    given = {key: value for key, value in message.items() if value is not None and value != []}
    if others := given.keys() - {"role", "content"}:
        what = "a tool's call or answer" if any("tool" in str(key) for key in others) else f"{len(others)} other keys"
        raise MessageError(where, "must have role and content only", what, "leave the rest out")
    if missing := [key for key in ("role", "content") if key not in given]:
        raise MessageError(where, "must have role and content", f"no {missing[0]}", "add it")
    role = given["role"]
    return role if isinstance(role, str) else None, given["content"]


def _text(content: Any, where: str, pictures: list[Mapping[str, Any]] | None, role: str) -> str:
    """The text of a turn; what its image parts hold is added to `pictures`."""
    if isinstance(content, str):
        return _writable(content, where)
    if not isinstance(content, list | tuple):
        raise MessageError(
            where, "must be a string or a list of parts", "something else", "write {'type': 'text', ...}"
        )
    texts = []
    for index, part in enumerate(content):
        place = f"{where}[{index}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str) or kind not in (*TEXT_PARTS, *IMAGE_PARTS):
            raise MessageError(f"{place}.type", "must be text or image_url", "another kind of part", "leave it out")
        held = {key: value for key, value in part.items() if key != "type" and value is not None}
        if kind in IMAGE_PARTS:
            if pictures is None or role != "user":
                raise MessageError(place, "images stand in messages of the user", "one elsewhere", "move it")
            pictures.append(held)
            texts.append(IMAGE_TAG)
        elif not isinstance(held.get("text"), str) or len(held) > 1:
            raise MessageError(place, "must have a text that is a string, and no more", "something else", "correct it")
        else:
            text = _writable(held["text"], f"{place}.text")
            texts.append(tag_as_text(text) if role == "user" else text)
    return "\n".join(texts)


def _writable(text: str, where: str) -> str:
    if _UNWRITABLE.search(text):
        raise MessageError(where, "must be text that UTF-8 can hold, without NUL", "another character", "take it out")
    return text
