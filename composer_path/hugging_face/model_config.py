"""`config.json` of a model folder: what stands in it, in both versions, and whether it is what an export writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODEL_TYPE, VISION_TYPE = "composer_path", "composer_path_vision"
ARCHITECTURE = "ComposerPathForConditionalGeneration"
VERSION = 2

# Key, of what type its value is, and whether it must be there.
_KEYS: dict[str, tuple[tuple[type, ...], bool]] = {
    "model_type": ((str,), True),
    "version": ((int,), True),
    "text_config": ((dict,), True),
    "vision_config": ((dict,), True),
    "projector_config": ((dict,), True),
    "image_token_id": ((int, type(None)), True),
    "num_image_tokens": ((int,), True),
    "tie_word_embeddings": ((bool,), True),
    "architectures": ((list,), False),
    "max_seq_len": ((int,), False),
    "imports": ((list,), False),
    "auto_map": ((dict,), False),
    "dtype": ((str, type(None)), False),
    "torch_dtype": ((str, type(None)), False),  # transformers 4's word
    "transformers_version": ((str,), False),
}
_FIX = "export the model again"
# What transformers 4 and 5 say of a language model that isn't its architecture.
_NOT_OF_TEXT = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")


def model_config(
    *,
    vision: Mapping[str, Any],
    projector: Mapping[str, Any],
    text: Mapping[str, Any],
    num_image_tokens: int | None,
    image_token_id: int | None = None,
    max_seq_len: int | None = None,
    imports: list[str] | None = None,
    dtype: str | None = None,
    transformers_version: str | None = None,
) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
        vision: Keywords of `untrained_vision_encoder`.
        projector: Keywords of `untrained_projector`.
        text: The language model's own configuration, as transformers writes it.
        num_image_tokens: Of an image of the encoder's size; None where the model wasn't built yet.
        image_token_id: Of the token that stands where an image's vectors go; None where no tokenizer is at hand.
        max_seq_len: Tokens of the longest conversation that was trained, where generation ends; None for no such limit.
        imports: What must be imported to have parts of one's own.
        dtype: Of the weights.
        transformers_version: That wrote it.
    """
    said = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "version": VERSION,
        "image_token_id": image_token_id,
        "num_image_tokens": num_image_tokens,
        "text_config": {key: value for key, value in text.items() if key not in _NOT_OF_TEXT},
        "vision_config": {"model_type": VISION_TYPE, **vision},
        "projector_config": dict(projector),
        "tie_word_embeddings": bool(text.get("tie_word_embeddings")),
    }
    more: dict[str, Any] = {
        "max_seq_len": max_seq_len,
        "imports": imports or None,
        "dtype": dtype,
        "transformers_version": transformers_version,
    }
    return said | {key: value for key, value in more.items() if value is not None}


def checked_config(where: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """The content in the words of version 2, whichever it was written in.

    Raises:
        ValueError: It is another program's, or not as an export writes it: what is missing, unknown or of another kind.
    """
    if content.get("model_type") != MODEL_TYPE:
        found = f"has model_type {content.get('model_type')!r:.60}"
        raise ValueError(
            f"{where} {found}, expected '{MODEL_TYPE}'; a folder in the reference's names is loaded by "
            "composer_path.load_reference_model"
        )
    version = content.get("version")
    if version not in (1, VERSION) or isinstance(version, bool):
        raise ValueError(f"{where}: version must be 1 or {VERSION}, found {version!r:.40}; take a newer composer_path")
    if version == 1:
        return _from_version_1(where, content)
    if unknown := sorted(set(content) - set(_KEYS)):
        raise ValueError(f"{where}: must be as export wrote it; found unknown keys {_some(unknown)}; {_FIX}")
    for key, (kinds, needed) in _KEYS.items():
        if key not in content:
            if needed:
                raise ValueError(f"{where}: must be as export wrote it; found no {key}; {_FIX}")
            continue
        value = content[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{where}: {key} must be {_kind(kinds)}; found {value!r:.60}; {_FIX}")
    _check_values(where, content)
    return dict(content)


def _check_values(where: str, content: Mapping[str, Any]) -> None:
    if (id := content["image_token_id"]) is not None and id < 0:
        raise ValueError(f"{where}: image_token_id must be a token's number; found {id}; {_FIX}")
    for key in ("num_image_tokens", "max_seq_len"):
        if content.get(key, 1) < 1:
            raise ValueError(f"{where}: {key} must be at least 1; found {content[key]}; {_FIX}")
    vision, text = content["vision_config"], content["text_config"]
    if vision.get("model_type") != VISION_TYPE:
        found = f"found {vision.get('model_type')!r:.60}"
        raise ValueError(f"{where}: vision_config's model_type must be '{VISION_TYPE}'; {found}; {_FIX}")
    for name, part, key in (("vision_config", vision, "name"), ("text_config", text, "model_type")):
        if not isinstance(part.get(key), str):
            raise ValueError(f"{where}: {name}'s {key} must be a name; found {part.get(key)!r:.60}; {_FIX}")
    if (id := content["image_token_id"]) is not None and type(rows := text.get("vocab_size")) is int and id >= rows:
        raise ValueError(f"{where}: image_token_id must be below vocab_size {rows}; found {id}; {_FIX}")


def _from_version_1(where: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """What the first version said: no image token, no sizes."""
    parts = ("vision_encoder", "projector", "language_model")
    known = {"model_type", "version", "imports", *parts}
    missing = [key for key in parts if not isinstance(content.get(key), dict)]
    if missing or (unknown := sorted(set(content) - known)):
        found = f"no {missing[0]}" if missing else f"unknown keys {_some(unknown)}"
        raise ValueError(f"{where}: must be as export wrote it; found {found}; {_FIX}")
    vision, projector, text = (content[key] for key in parts)
    return {
        "model_type": MODEL_TYPE,
        "version": 1,
        "architectures": [ARCHITECTURE],
        "image_token_id": None,
        "text_config": dict(text),
        "vision_config": {"model_type": VISION_TYPE, **vision},
        "projector_config": dict(projector),
        "tie_word_embeddings": bool(text.get("tie_word_embeddings")),
        **({"imports": content["imports"]} if "imports" in content else {}),
    }


def vision_keywords(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `untrained_vision_encoder` is called with."""
    return {key: value for key, value in config["vision_config"].items() if key != "model_type"}


def _kind(kinds: tuple[type, ...]) -> str:
    words = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a whole number"}
    return " or ".join(words.get(kind, "null") for kind in kinds)


def _some(names: list[str]) -> str:
    return ", ".join(f"{name!r:.60}" for name in names[:5])
