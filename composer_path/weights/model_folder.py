"""The whole model as a folder of our own: what an export writes and `PathMLLM.from_pretrained` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from composer_path.models.attention import AttentionBackend
from composer_path.models.language_model import build_language_model, empty_parameters
from composer_path.models.path_mllm import MODEL_TYPE, PathMLLM
from composer_path.models.projector import build_projector
from composer_path.models.vision_encoder import build_vision_encoder
from composer_path.weights.folder import read_folder, write_folder

HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def save_model(
    model: PathMLLM,
    folder: Path,
    state_dict: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write weights and configuration; tied weights once. Arguments as those of `PathMLLM.save_pretrained`."""
    tensors = dict(model.state_dict() if state_dict is None else state_dict)
    if model.language_model.config.tie_word_embeddings:
        tensors.pop(HEAD, None)
    if dtype is not None:
        tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    write_folder(folder, model.config(), tensors, max_shard_size)


def load_model(folder: Path, attention: AttentionBackend = "auto", dtype: torch.dtype | None = None) -> PathMLLM:
    """Rebuild the model from its configuration and fill it. Arguments as those of `PathMLLM.from_pretrained`."""
    config, tensors = read_folder(folder, MODEL_TYPE)
    with empty_parameters():
        model = PathMLLM(
            build_vision_encoder(**config["vision_encoder"]),
            build_projector(**config["projector"]),
            build_language_model(config=config["language_model"], attention=attention),
        )
    if dtype is not None:
        tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    if model.language_model.config.tie_word_embeddings:
        tensors[HEAD] = tensors[EMBEDDING]
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    if missing or unexpected:
        raise ValueError(f"'{folder}': weights don't fit config.json; missing {missing}, left over {unexpected}")
    model.language_model.tie_weights()
    return model.eval()
