"""`model.path`: one folder with a whole model in place of the sections that say its parts.

It is read as what it stands for, so that all behind it (checks, plan, fingerprint, export) knows one way to say it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from composer_path.weights.whole_folder import sections_of

# What may stand beside it, by section: what isn't weights, nor what the weights are of.
BESIDE = {
    "vision_encoder": ("image_size", "tokens", "mean", "std"),
    "projector": (),
    "language_model": ("resize_embeddings",),
}


def expand_model_path(config: DictConfig) -> Iterator[str]:
    """Put the sections for a folder in `model.path`'s place, and its tokenizer where none is named; yields problems."""
    model = config.get("model") if "model" in config and not OmegaConf.is_missing(config, "model") else None
    if not isinstance(model, DictConfig) or "path" not in model:
        return
    try:
        path = model.pop("path")
    except OmegaConfBaseException as error:
        yield f"model.path: can't be filled in: {str(error).partition(chr(10))[0]}"
        return
    if path is None:
        return
    if not isinstance(path, str):
        yield f"model.path: found {path!r:.60}; it must be text: a folder with a whole model"
        return
    given: dict[str, Any] = {}
    for name in BESIDE:
        section = OmegaConf.to_container(model[name], resolve=False) if model.get(name) is not None else {}
        given[name] = section if isinstance(section, dict) else {}
    tower = given["vision_encoder"].pop("weights", None)
    try:
        sections = sections_of(path, tower if isinstance(tower, str) else None)
    except ValueError as error:
        yield f"model.path: {error}"
        return
    if tower is not None and sections["vision_encoder"].get("weights") != tower:
        yield f"model.vision_encoder.weights: stands beside model.path, '{path}', which has them; remove one of the two"
    for name, section in given.items():
        for key in [key for key in section if key not in BESIDE[name] and section[key] is not None]:
            yield f"model.{name}.{key}: stands beside model.path, '{path}', which says it; remove one of the two"
        model[name] = sections[name] | {key: value for key, value in section.items() if key in BESIDE[name]}
    if "tokenizer" not in config:
        config["tokenizer"] = {"path": path}
