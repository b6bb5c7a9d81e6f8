"""A model folder's config.json is what an export writes, or is refused by what is wrong with it."""

from __future__ import annotations

from typing import Any

import pytest

from composer_path.hugging_face.configuration import ComposerPathConfig
from composer_path.hugging_face.model_config import checked_config, model_config

GOOD = model_config(
    vision={"name": "coca_vit-l", "image_size": 32},
    projector={"in_dim": 8, "out_dim": 8},
    text={"model_type": "llama", "vocab_size": 97, "_name_or_path": "/home/somebody", "architectures": ["A"]},
    num_image_tokens=4,
    image_token_id=96,
)


def test_what_is_written_is_read_and_names_no_place() -> None:
    assert checked_config("here", GOOD) == GOOD
    assert "_name_or_path" not in GOOD["text_config"] and "architectures" not in GOOD["text_config"]
    assert ComposerPathConfig.from_dict(dict(GOOD)).to_dict()["vision_config"] == GOOD["vision_config"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava"}, "has model_type 'llava', expected 'composer_path'"),
        ({"version": 3}, "version must be 1 or 2, found 3"),
        ({"version": True}, "version must be 1 or 2, found True"),
        ({"image_tokn_id": 1}, "unknown keys 'image_tokn_id'"),
        ({"text_config": None}, "text_config must be an object; found None"),
        ({"image_token_id": "96"}, "image_token_id must be a whole number or null; found '96'"),
        ({"image_token_id": True}, "image_token_id must be a whole number or null; found True"),
        ({"image_token_id": -200}, "image_token_id must be a token's number; found -200"),
        ({"image_token_id": 97}, "image_token_id must be below vocab_size 97; found 97"),
        ({"num_image_tokens": 0}, "num_image_tokens must be at least 1; found 0"),
        ({"vision_config": {"name": "coca_vit-l"}}, "vision_config's model_type must be 'composer_path_vision'"),
        ({"vision_config": {"model_type": "composer_path_vision"}}, "vision_config's name must be a name; found None"),
        ({"text_config": {"vocab_size": 97}}, "text_config's model_type must be a name; found None"),
    ],
)
@pytest.mark.parametrize("reader", ["ours", "transformers"])
def test_what_is_wrong_is_named_by_our_reader_and_by_transformers(
    change: dict[str, Any], message: str, reader: str
) -> None:
    content = GOOD | change
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        checked_config("here", content) if reader == "ours" else ComposerPathConfig.from_dict(content)


@pytest.mark.parametrize("key", ["text_config", "vision_config", "projector_config", "image_token_id", "version"])
def test_what_is_missing_is_named(key: str) -> None:
    content = {name: value for name, value in GOOD.items() if name != key}
    with pytest.raises(ValueError, match=f"found no {key}" if key != "version" else "version must be 1 or 2"):
        checked_config("here", content)


def test_the_first_version_is_read_in_the_words_of_the_second() -> None:
    first: dict[str, Any] = {"model_type": "composer_path", "version": 1, "vision_encoder": {"name": "coca_vit-l"}}
    first |= {"projector": {"in_dim": 8, "out_dim": 8}, "language_model": {"model_type": "llama"}}
    found = checked_config("here", first)
    assert found["image_token_id"] is None and found["text_config"] == first["language_model"]
    assert found["vision_config"] == {"model_type": "composer_path_vision", "name": "coca_vit-l"}
    with pytest.raises(ValueError, match="found no projector"):
        checked_config("here", {key: value for key, value in first.items() if key != "projector"})
    with pytest.raises(ValueError, match="unknown keys 'more'"):
        checked_config("here", first | {"more": 1})
