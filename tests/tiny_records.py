"""Records of a few words, as `json.loads` gives them."""

from __future__ import annotations

from typing import Any


def question(text: str = "Which stain?") -> dict[str, str]:
    return {"from": "human", "value": text}


def answer(text: str = "Haematoxylin and eosin.") -> dict[str, str]:
    return {"from": "assistant", "value": text}


def record(*turns: dict[str, str], **keys: Any) -> dict[str, Any]:
    return {**keys, "conversations": list(turns) or [question(), answer()]}
