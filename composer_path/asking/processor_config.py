"""`processor_config.json` in a model folder: how text and images were prepared when the model was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from composer_path.images.pixels import ImagePreparation, pad_color_of
from composer_path.models.path_mllm import PathMLLM
from composer_path.own_parts.registry import check_sources, sources_of
from composer_path.records.prompts import get_template
from composer_path.records.tokenize import TextPreparation
from composer_path.weights.folder import write_json

PROCESSOR_CONFIG = "processor_config.json"
# What the model itself knows stands in its own configuration.
_TEXT, _IMAGES = ("image_position", "max_seq_len"), ("fit", "decoder", "max_pixels")


def write_processor_config(folder: Path, text: TextPreparation, images: ImagePreparation) -> None:
    """Write both, without what is read from the model."""
    settings: dict[str, Any] = {"template": text.template.to_json()}
    if imports := sources_of(templates=text.template.name):
        settings["imports"] = imports
    settings |= {key: getattr(text, key) for key in _TEXT} | {key: getattr(images, key) for key in _IMAGES}
    write_json(folder / PROCESSOR_CONFIG, settings)


def read_processor_config(folder: Path, model: PathMLLM) -> tuple[TextPreparation, ImagePreparation]:
    """Both, for the model of this folder.

    Raises:
        ValueError: It isn't there, isn't what an export writes, or names a template that doesn't exist.
    """
    file = folder / PROCESSOR_CONFIG
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        fix = "give the folder that composer-path export wrote"
        raise ValueError(f"no {PROCESSOR_CONFIG} in '{folder}'; {fix}") from None
    except ValueError as error:
        raise ValueError(f"'{file}' is damaged ({type(error).__name__}); export the model again") from None
    known = {"template", "imports", *_TEXT, *_IMAGES}
    missing = {"template", *_TEXT, "fit", "decoder"} - set(settings) if isinstance(settings, dict) else known
    if missing or set(settings) - known:
        found = f"lacks {sorted(missing)}" if missing else f"has unknown keys {sorted(set(settings) - known)}"
        raise ValueError(f"'{file}': must hold what an export writes, but it {found}; export the model again")
    check_sources(str(file), settings)
    encoder = model.vision_encoder
    text = {key: settings[key] for key in _TEXT}
    images = {key: settings[key] for key in _IMAGES if key in settings}  # older folders don't name all
    prepared = TextPreparation(get_template(settings["template"]), model.num_image_tokens(), **text)
    return prepared, ImagePreparation(encoder.image_size, pad_color=pad_color_of(encoder.mean), **images)
