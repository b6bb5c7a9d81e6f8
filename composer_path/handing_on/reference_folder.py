"""`--as reference`: a folder that the reference's own builder loads and asks.

Besides the model it wants a tokenizer there, and its vision tower's weights once more in a file of their own: its
builder makes that tower anew, random where it finds no file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from composer_path.handing_on.stock_config import dtype_word, generation_config
from composer_path.handing_on.trained_model import whole_weights
from composer_path.hugging_face.image_token import with_marks
from composer_path.records.prompts import LLAVA_SYSTEM, LlavaLlama2Template, PlainTemplate
from composer_path.records.vocabulary import save_tokenizer
from composer_path.run.export import Trained
from composer_path.run.published import publish
from composer_path.storage.atomic import write_whole
from composer_path.weights.folder import write_json
from composer_path.weights.reference import TRUNK, save_reference_model

VISION_TOWER_FILE = "vision_tower.pt"
VISION_TOWER_PREFIX = "vision_tower."  # of that file's keys


def write_reference(folder: Path, found: Trained, dtype: str | None = None) -> None:
    """Write the model in the reference's names, its vision tower's file, configuration and tokenizer.

    Raises:
        ValueError: What the reference can't do: other parts, prompts, images or image sizes.
    """
    check_sayable(found)
    weights = whole_weights(found, dtype)
    tokenizer, mark_id = found.tokenizer, None
    if found.model.projector.marks is not None:
        tokenizer, mark_id = with_marks(tokenizer)
    more: dict[str, Any] = {
        "image_aspect_ratio": "pad" if found.images.fit == "pad" else "square",
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": found.text.max_seq_len,
        "torch_dtype": dtype_word(weights),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    tower = {VISION_TOWER_PREFIX + key.removeprefix(TRUNK): value for key, value in weights.items() if TRUNK in key}

    def write(new: Path) -> None:
        save_tokenizer(tokenizer, new)
        write_json(new / "generation_config.json", generation_config(found.text, tokenizer))
        save_reference_model(found.model, new, state_dict=weights, more_config=more, mark_id=mark_id)
        plain = {key: value.detach().cpu().contiguous() for key, value in tower.items()}
        write_whole(new / VISION_TOWER_FILE, lambda file: torch.save(plain, file))

    publish(folder, "reference", write)


def check_sayable(found: Trained) -> None:
    """Refuse what the reference would load, and then ask otherwise than it was trained."""
    template, problems = found.text.template, []
    own_system = isinstance(template, LlavaLlama2Template) and template.system != LLAVA_SYSTEM
    if not isinstance(template, LlavaLlama2Template | PlainTemplate) or own_system:
        which = "llava_llama_2 with another system message" if own_system else f"'{template.name}'"
        problems.append(f"template {which} (it has plain, and llava_llama_2 with its own system message)")
    if found.text.image_position != "front":
        problems.append(f"image_position {found.text.image_position} (it has front)")
    if Path(getattr(found.tokenizer, "vocab_file", None) or "").suffix != ".model":
        problems.append("a tokenizer without a sentencepiece file (it has LLaMA's)")
    if problems:
        fix = "take --as llava-hf or leave --as out"
        raise ValueError(f"--as reference: the reference can't ask a model with {', '.join(problems)}; {fix}")
