"""A language model's folder, as transformers writes it: configuration and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from composer_path.models.attention import AttentionBackend, resolve_attention
from composer_path.models.language_model import load_language_model_config, untrained_language_model
from composer_path.models.rope_keys import TRANSFORMERS_MAJOR
from composer_path.weights.tensor_file import check_pickled_weights


def build_language_model(
    path: str | None = None,
    config: dict[str, Any] | str | None = None,
    *,
    attention: AttentionBackend = "auto",
    dtype: torch.dtype = torch.float32,
    empty: bool = False,
) -> PreTrainedModel:
    """A causal language model whose attention is padding-free, with the weights of a folder or random ones.

    Args:
        path: A Hugging Face folder with configuration and weights.
        config: Instead of `path`: see `untrained_language_model`, also for the other arguments.
        attention: Likewise.
        dtype: Likewise.
        empty: Likewise; of a folder only the configuration is read.

    Raises:
        ValueError: Neither or both of `path` and `config`, a path that isn't there, pickled weights that hold other
            than tensors, or an unsupported architecture.
    """
    if (path is None) == (config is None):
        raise ValueError(
            "model.language_model: give either 'path' (a folder with weights) or 'config' (random weights)"
        )
    if path is not None and not (Path(path) / "config.json").is_file():
        raise ValueError(
            f"model.language_model.path: no config.json in '{path}'; it must be a Hugging Face model folder"
        )
    if path is None or empty:
        return untrained_language_model(path or config or {}, attention=attention, dtype=dtype, empty=empty)
    check_pickled_weights(path)
    return AutoModelForCausalLM.from_pretrained(
        path,
        config=load_language_model_config(path),
        attn_implementation=resolve_attention(attention),
        local_files_only=True,
        trust_remote_code=False,
        **{"dtype" if TRANSFORMERS_MAJOR >= 5 else "torch_dtype": dtype},
    )
