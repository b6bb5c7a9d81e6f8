"""How text and images were prepared when the model of a folder was trained."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase as Tokenizer

from composer_path.hugging_face.processor_folder import PROCESSOR_CONFIG, TEXT, read_settings
from composer_path.images.pixels import ImagePreparation, pad_color_of
from composer_path.own_parts.registry import check_sources
from composer_path.records.prompts import get_template
from composer_path.records.tokenize import TextPreparation
from composer_path.weights.model_folder import PathMLLM

_IMAGES = ("fit", "decoder", "max_pixels", "scale_levels")  # what the model itself doesn't know
FIX = "export the model again"


def check_image_token(folder: Path, model: PathMLLM, tokenizer: Tokenizer) -> None:
    """Refuse a folder whose files name different tokens for an image; ValueError. Earlier versions name none."""
    word, id = read_settings(folder).get("image_token"), model.image_token_id
    if word is None or id is None:
        return
    known = tokenizer.get_vocab().get(word) if isinstance(word, str) else None
    if known != id:
        rule = "one token must stand for an image in config.json, processor_config.json and the tokenizer"
        raise ValueError(f"'{folder}': {rule}; found {id}, {word!r:.40} and {known} for it; {FIX}")


def read_processor_config(folder: Path, model: PathMLLM) -> tuple[TextPreparation, ImagePreparation]:
    """Both, for the model of this folder.

    Raises:
        ValueError: It isn't there, isn't what an export writes or doesn't fit the model, or names a template that
            doesn't exist.
    """
    file = folder / PROCESSOR_CONFIG
    settings = read_settings(folder)
    of_model = {
        "image_size": model.vision_encoder.image_size,
        "pad_color": list(pad_color_of(model.vision_encoder.mean)),
        "num_image_tokens": model.num_image_tokens(),
    }
    if model.max_seq_len is not None:
        of_model["max_seq_len"] = model.max_seq_len
    known = {"template", "imports", "image_token", *TEXT, *_IMAGES, *of_model}
    if missing := {"template", *TEXT, "fit", "decoder"} - set(settings):
        raise ValueError(f"'{file}': must hold what an export writes, but it lacks {sorted(missing)}; {FIX}")
    if unknown := set(settings) - known:
        raise ValueError(f"'{file}': must hold what an export writes, but it has unknown keys {sorted(unknown)}; {FIX}")
    for key, value in of_model.items():
        if settings.get(key, value) != value:
            raise ValueError(f"'{file}': {key} must be the model's {value}; found {str(settings[key])[:80]}; {FIX}")
    check_sources(str(file), settings)
    text = {key: settings[key] for key in TEXT}
    images = {key: settings[key] for key in _IMAGES if key in settings}  # older folders don't name all
    prepared = TextPreparation(get_template(settings["template"]), model.num_image_tokens(), **text)
    size, color = model.vision_encoder.image_size, pad_color_of(model.vision_encoder.mean)
    return prepared, ImagePreparation(size, pad_color=color, **images)
