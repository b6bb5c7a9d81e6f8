"""Pictures of a request: data URLs, within limits, decoded in a process that may die. Nothing is fetched or kept."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from composer_path.records.rules import RULES, ImageError
from composer_path.serving.refusal import Refusal

_DATA_URL = re.compile(r"data:image/[\w.+-]{1,40};base64,", re.ASCII | re.IGNORECASE)
_LINK = re.compile(r"(https?|ftp|file|blob):", re.ASCII | re.IGNORECASE)
DETAILS = ("auto", "low", "high")  # a model sees every picture at its one size


@dataclass(frozen=True)
class PictureLimits:
    """How many pictures a request may have, and of how many bytes each."""

    images: int = 8
    image_bytes: int = 16 * 2**20

    @property
    def body_bytes(self) -> int:
        """What a whole request may have: the pictures in base64, and a MiB of everything else."""
        return self.images * (self.image_bytes * 4 // 3 + 256) + 2**20


def picture_bytes(held: Mapping[str, Any], number: int, limits: PictureLimits) -> bytes:
    """The bytes of what an image part holds; `number` is its place among the pictures, from 1 on.

    Raises:
        Refusal: It isn't a data URL of a picture, or is too large.
    """
    where = f"image {number}"
    fix = "send data:image/png;base64,... or the like; nothing is fetched"
    if held.keys() - {"image_url", "detail"} or "image_url" not in held:
        raise _refused(f"{where}: must have image_url and no more; found another key; {fix}")
    said = held["image_url"]
    url, detail = said, held.get("detail", "auto")
    if isinstance(said, dict):
        if said.keys() - {"url", "detail"}:
            raise _refused(f"{where}: image_url must have url and detail only; found another key; leave it out")
        url, detail = said.get("url"), said.get("detail") or detail
    if detail not in DETAILS:
        raise _refused(f"{where}: detail must be auto, low or high; found another value; leave it out")
    if not isinstance(url, str):
        raise _refused(f"{where}: url must be a data URL; found no string; {fix}")
    start = _DATA_URL.match(url)
    if start is None:
        link = _LINK.match(url)
        kind = "a data URL of another kind" if url[:5].lower() == "data:" else "a file's path or something else"
        found = f"a link ({link[1].lower()})" if link else kind
        raise _refused(f"{where}: url must be a data URL in base64; found {found}; {fix}")
    if (len(url) - start.end()) * 3 // 4 > limits.image_bytes + 2:
        raise _refused(
            f"{where}: must have at most {limits.image_bytes} bytes; found more; make it smaller",
            413,
            "image_too_large",
        )
    try:
        data = base64.b64decode(url[start.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise _refused(f"{where}: must be base64; found other characters or a wrong end; encode it again") from None
    if not data:
        raise _refused(f"{where}: must hold a picture; found nothing; send its bytes")
    return data


def unreadable(error: ImageError, number: int) -> Refusal:
    """A picture that no training would have taken either."""
    said = f"{RULES[error.rule]}; found {error.found}; send another"  # what to do is meant for conversions
    return _refused(f"image {number}: {said}", code="invalid_image")


def _refused(message: str, status: int = 400, code: str = "invalid_image_url") -> Refusal:
    return Refusal(message, status, "messages", code)
