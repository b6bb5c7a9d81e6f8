"""`--as llava-hf`: a stock `LlavaForConditionalGeneration`, which transformers and vLLM load without this package."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from composer_path.handing_on.llava_hf_vision import stock_tower
from composer_path.handing_on.stock_chat import stock_chat_template
from composer_path.handing_on.stock_config import dtype_word, generation_config, stock_config
from composer_path.handing_on.trained_model import whole_weights
from composer_path.hugging_face.image_token import with_image_row, with_image_token
from composer_path.models.language_types import inputs_scale
from composer_path.models.projector import PooledMlp, Projector
from composer_path.records.vocabulary import load_tokenizer, save_tokenizer
from composer_path.run.export import Trained, part_of
from composer_path.run.published import publish
from composer_path.weights.folder import write_folder, write_json
from composer_path.weights.projector_names import to_stock_projector

log = logging.getLogger(__name__)
TEMPLATE = "chat_template.jinja"


def write_llava_hf(folder: Path, found: Trained, dtype: str | None = None) -> None:
    """Write the folder: configuration, weights, processor, tokenizer, how it generates.

    Raises:
        ValueError: A part that stock LLaVA can't have; it is named, with what it takes.
    """
    model = found.model
    check_projector(model.projector)
    if inputs_scale(model.language_model.config) != 1:
        kind = model.language_model.config.model_type
        raise ValueError(f"--as llava-hf: '{kind}' scales its embeddings, images' too in a stock LLaVA; leave --as out")
    weights = whole_weights(found, dtype)
    tower = stock_tower(model.vision_encoder, part_of(weights, "vision_encoder"))
    tokenizer, token = with_image_token(found.tokenizer)
    weights = with_image_row(model.language_model, weights, token)
    projector = to_stock_projector(part_of(weights, "projector"))
    tensors = tower.weights | {f"multi_modal_projector.{key}": value for key, value in projector.items()}
    tensors |= {key: value for key, value in weights.items() if key.startswith("language_model.")}
    text = stock_config(model.language_model.config) | {"vocab_size": len(weights[model.embedding_name()])}
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text,
        "vision_config": tower.config,
        "image_token_index": token.id,
        "image_seq_length": model.num_image_tokens(),
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": tower.select,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "torch_dtype": dtype_word(tensors),
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": token.text,
        "patch_size": tower.config["patch_size"],
        "num_additional_image_tokens": tower.num_prefix_tokens,
        "vision_feature_select_strategy": tower.select,
    }

    def write(new: Path) -> None:
        save_tokenizer(tokenizer, new)
        _write_chat_template(new, found, token.text)
        write_json(new / "processor_config.json", processor)
        write_json(new / "preprocessor_config.json", image_processor(found))
        generation = generation_config(found.text, found.tokenizer, suppress_tokens=[token.id])
        write_json(new / "generation_config.json", generation)
        write_folder(new, config, tensors)

    publish(folder, "llava-hf", write)


def _write_chat_template(folder: Path, found: Trained, token: str) -> None:
    """Write one that is right for the stock processor, in place of the tokenizer's own, or none."""
    jinja = stock_chat_template(found.text, load_tokenizer(folder), token)
    (folder / TEMPLATE).unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if settings.pop("chat_template", None) is not None:
        write_json(folder / "tokenizer_config.json", settings)
    if jinja is None:
        log.warning(
            "--as llava-hf: no chat template is written: a stock processor would make other ids of the template '%s' "
            "with this tokenizer than training did; give it input_ids of composer_path.tokenize_prompt",
            found.text.template.name,
        )
    else:
        (folder / TEMPLATE).write_text(jinja, encoding="utf-8")


def check_projector(projector: Projector) -> None:
    """Refuse what isn't linear, GELU, linear."""
    if not isinstance(projector, PooledMlp) or projector.pooler is not None or projector.config["mlp"]["depth"] != 2:
        found = {key: value for key, value in projector.config.items() if key not in ("in_dim", "out_dim")}
        raise ValueError(f"--as llava-hf: a stock LLaVA can't have the projector {found}; it takes type mlp2x_gelu")
    if projector.marks is not None:
        rule = "a stock LLaVA has no marks around images (model.projector.image_marks)"
        raise ValueError(f"--as llava-hf: {rule}; take --as reference or leave --as out")


def image_processor(found: Trained) -> dict[str, Any]:
    """Keys of `preprocessor_config.json`: LLaVA's own for `fit: pad`, else CLIP's, which cuts out the centre."""
    encoder, size = found.model.vision_encoder, found.images.image_size
    pads = found.images.fit == "pad"
    keys: dict[str, Any] = {
        "image_processor_type": "LlavaImageProcessor" if pads else "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
    }
    return keys | ({"do_pad": True} if pads else {})
