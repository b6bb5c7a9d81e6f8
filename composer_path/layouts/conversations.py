"""Conversations: our own records (LLaVA, Quilt-Instruct, PathGen-Instruct, ShareGPT), and `messages`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from composer_path.layouts.row import IMAGE_KEYS, Row, wrong_type
from composer_path.records.key_names import flag_meant
from composer_path.records.messages import IMAGE_PARTS, TEXT_PARTS
from composer_path.records.rules import IMAGE_TAG, RecordError
from composer_path.records.turn_weight import FLAGS

_TOOL_ROLES = ("tool", "function", "function_call", "observation", "tool_call", "tool_response")
# How a part of messages holds its picture.
_PICTURE_KEYS = ("image", "image_url", "path", "url", "bytes")
_TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id")


def llava(row: Row, prompts: Sequence[str]) -> dict[str, Any]:
    """`{id, image, conversations: [{from, value}]}`: a plain record as it is, bytes and `images` read as its images."""
    record = {str(key): value for key, value in row.values.items()}
    if record.get("images") is not None and record.get("image") is None:
        record["image"] = record.pop("images")
    elif record.get("images") is not None:
        raise RecordError("unknown-layout", "'image' and 'images' in one record", "leave one of them", "images")
    row.refuse_media()
    row.mark(*record, "images")  # what a plain record holds is looked at by its own rules
    image = record.get("image")
    if isinstance(image, list):
        record["image"] = [row.picture(one, "image") for one in image]
    elif image is not None:
        record["image"] = row.picture(image, "image")
    turns = record.get("conversations")
    if isinstance(turns, list):
        for turn in turns:
            if isinstance(turn, dict):
                _refuse_tools(turn.get("from"), turn)
    return record


def messages(row: Row, prompts: Sequence[str]) -> dict[str, Any]:
    """`{messages: [{role, content}], images: [...]}`, content as text or as parts, `from` and `value` also.

    A system message at the start becomes the record's; parts stand on lines of their own, an image part as its tag.
    """
    row.refuse_media()
    given = row.need("messages", "conversations")
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise wrong_type("messages", "a list of {role, content}")
    named: list[Any] = []
    turns = [_turn(row, one, f"messages[{index}]", named) for index, one in enumerate(given)]
    record = row.about() | {flag: row.get(flag) for flag in FLAGS if row.has(flag)}
    if turns and turns[0].get("from") in ("system", "developer"):
        record["system"] = turns.pop(0)["value"]
    if row.has("system") and record.setdefault("system", system := row.get("system")) != system:
        raise RecordError("unknown-layout", "two system messages that differ", "leave one of them", "system")
    images = row.pictures("images", *IMAGE_KEYS)
    if named and images and named != images:
        found, fix = "pictures in parts and beside the messages", "name each picture once"
        raise RecordError("unknown-layout", found, fix, "images")
    if images := images or named:
        record["image"] = images[0] if len(images) == 1 else images
    return {**record, "conversations": turns}


def has_roles(turns: Any) -> bool:
    """Whether what a record calls its conversations are messages `{role, content}`."""
    if not isinstance(turns, list) or not turns:
        return False
    return all(isinstance(one, dict) and "role" in one and "from" not in one for one in turns)


def _turn(row: Row, message: Mapping[str, Any], where: str, named: list[Any]) -> dict[str, Any]:
    """Return a message as a turn; pictures that its parts name are added to `named`."""
    message = {key: value for key, value in message.items() if value is not None}
    for ours, theirs in (("from", "role"), ("value", "content")):
        if ours in message and theirs in message:
            raise RecordError("unknown-layout", f"'{ours}' and '{theirs}' in one message", "leave one of them", where)
    role = message.pop("role", message.pop("from", None))
    _refuse_tools(role, message)
    content = message.pop("content", message.pop("value", None))
    others: dict[str, Any] = {}
    if isinstance(content, list):
        parts = [_part(row, part, f"{where}.content[{i}]", named, others) for i, part in enumerate(content)]
        content = "\n".join(parts)
    # Flags such as `loss` and `weight` go on to the turn, and so does what nobody reads, to be counted there.
    known = {"from": role, "value": content}
    return {**others, **message, **({} if role is content is None else known)}


def _part(row: Row, part: Any, where: str, named: list[Any], others: dict[str, Any]) -> str:
    """Return a part's text, or the tag of its picture; what nobody reads of it is added to `others`."""
    if not isinstance(part, dict):
        raise wrong_type(where, "an object {'type': ...}")
    kind = part.get("type")
    known = ("type", "text") if kind in TEXT_PARTS else ("type", "text", *_PICTURE_KEYS)
    unread = {key: value for key, value in part.items() if key not in known and value is not None}
    if any(flag_meant(key, value) for key, value in unread.items()):
        fix = "give the flag to the whole turn, or leave it out"
        raise RecordError("lookalike-key", "a flag of a part", fix, where)
    others |= unread
    if kind in TEXT_PARTS:
        if not isinstance(text := part.get("text"), str):
            raise wrong_type(f"{where}.text", "a string")
        return text
    if kind not in IMAGE_PARTS:
        raise RecordError(
            "unsupported-layout", "a part that is neither text nor image", "leave it out", f"{where}.type"
        )
    pictures = [part[key] for key in _PICTURE_KEYS if part.get(key) is not None]
    if "bytes" in part and part["bytes"] is not None:
        pictures = [part]
    if len(pictures) > 1:
        raise RecordError("unknown-layout", "a part that names several pictures", "leave one of them", where)
    for picture in pictures:
        named.append(row.picture(picture, where))
    return IMAGE_TAG


def _refuse_tools(role: Any, message: Mapping[str, Any]) -> None:
    """Refuse what a tool was asked or has said."""
    if role in _TOOL_ROLES or any(message.get(key) for key in _TOOL_KEYS):
        found = "a turn of a tool, or a call of one"
        raise RecordError("tool-turn", found, "leave such records out, or put the tool's answer into a question")
