"""A picture out of a message's part: what lies on this machine or in the message, nothing of a network."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_KEYS = ("image", "image_url", "url", "path", "base64", "bytes")


def picture_in(part: Mapping[str, Any]) -> Any:
    """What the image processor takes: an opened picture, an array, a path or bytes.

    Raises:
        ValueError: The part holds no picture or several, one of a network, or base64 that is damaged.
    """
    held = [part[key] for key in _KEYS if part.get(key) is not None]
    if len(held) != 1:
        raise ValueError(f"messages: an image part must hold one picture; found {len(held)}; give it as 'image'")
    picture = held[0]
    if isinstance(picture, Mapping):  # OpenAI's {"url": ...}
        picture = picture.get("url")
    if "base64" in part and isinstance(picture, str):
        return _decoded(picture)
    if not isinstance(picture, str):
        return picture
    if picture.startswith("data:"):
        head, _, data = picture.partition(",")
        if not head.endswith(";base64"):
            raise ValueError("messages: a data URL must be base64; found another; write data:image/png;base64,...")
        return _decoded(data)
    if picture.startswith("file://"):
        return Path(picture.removeprefix("file://"))
    if "://" in picture[:16]:
        raise ValueError("messages: a picture must lie on this machine; found an address; load it and give its bytes")
    return picture


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("messages: base64 of a picture must be whole; found damaged data; encode it again") from None
