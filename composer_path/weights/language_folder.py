"""A language model's folder, as transformers writes it: configuration and weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from composer_path.models.attention import AttentionBackend, resolve_attention
from composer_path.models.language_model import load_language_model_config, untrained_language_model
from composer_path.models.rope_keys import TRANSFORMERS_MAJOR
from composer_path.weights.tensor_file import WeightsError, check_pickled_weights, check_tensor_folder, not_finite, some


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
    hf_config = load_language_model_config(path)
    check_pickled_weights(path)
    check_tensor_folder(path)
    if getattr(hf_config, "quantization_config", None):
        fix = "take its weights in bf16 or fp32"
        raise WeightsError(f"model.language_model.path: the weights in '{path}' must not be quantized; {fix}")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=hf_config,
            attn_implementation=resolve_attention(attention),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # else it says no more than that there are some
            **{"dtype" if TRANSFORMERS_MAJOR >= 5 else "torch_dtype": dtype},
        )
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, ValueError, KeyError) as error:
        why = str(error).partition("\n")[0]
        raise WeightsError(f"model.language_model.path: the weights in '{path}' can't be read: {why}") from error
    model, names = loaded
    _check_names(path, names)
    if broken := not_finite(dict(model.named_parameters())):
        raise WeightsError(
            f"model.language_model.path: the weights in '{path}' must be finite; found NaN or infinity in "
            f"{some(broken)}; take an undamaged copy"
        )
    return model


def _mismatch(entry: str | tuple[str, Sequence[int], Sequence[int]]) -> str:
    """A name, and from transformers 5 on its two shapes."""
    return entry if isinstance(entry, str) else f"{entry[0]}: the file has {[*entry[1]]}, the model {[*entry[2]]}"


def _check_names(path: str, found: dict[str, Any]) -> None:
    """Raise where transformers would leave weights random, or weights of the folder unused: it only logs that."""
    wrong = {
        "missing": sorted(map(str, found["missing_keys"])),
        "left over": sorted(map(str, found["unexpected_keys"])),
        "other shapes": sorted(map(_mismatch, found["mismatched_keys"])),
    }
    lists = [f"{title} ({len(keys)}): {some(keys)}" for title, keys in wrong.items() if keys]
    lists += [str(message) for message in found.get("error_msgs") or ()]
    if lists:
        fix = "take the folder of a whole model, with the names that transformers writes"
        raise WeightsError(
            f"model.language_model.path: '{path}' doesn't fit its config.json. {'. '.join(lists)}; {fix}"
        )
