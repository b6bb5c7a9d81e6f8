"""A language model's folder: configuration and weights, as transformers and those who build on it write them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from composer_path.models.attention import AttentionBackend, resolve_attention
from composer_path.models.language_model import (
    MERGE,
    NOT_QUANTIZED,
    STOCK,
    is_vision_language_folder,
    load_language_model_config,
    untrained_language_model,
)
from composer_path.models.language_types import decoder_of
from composer_path.models.rope_keys import TRANSFORMERS_MAJOR
from composer_path.models.vocabulary_rows import add_rows, tied_names
from composer_path.weights.language_names import COMPUTED, kind_of, names_in_model
from composer_path.weights.tensor_file import WeightsError, not_finite, read_tensor_folder, some

log = logging.getLogger(__name__)


def build_language_model(
    path: str | None = None,
    config: dict[str, Any] | str | None = None,
    *,
    resize_embeddings: bool = False,
    vocabulary: int | None = None,
    attention: AttentionBackend = "auto",
    dtype: torch.dtype = torch.float32,
    empty: bool = False,
) -> PreTrainedModel:
    """A causal language model whose attention is padding-free, with the weights of a folder or random ones.

    Args:
        path: A Hugging Face folder with configuration and weights: a language model's, or that of a vision-language
            model, of which its language model is taken.
        config: Instead of `path`: see `untrained_language_model`, also for the other arguments.
        resize_embeddings: Where the tokenizer has more ids than there are embeddings, add rows to these and to the
            head: the mean of the old ones.
        vocabulary: How many ids the tokenizer has, where that is known.
        attention: Likewise.
        dtype: Likewise.
        empty: Likewise; of a folder only the configuration is read.

    Raises:
        ValueError: Neither or both of `path` and `config`, a path that isn't there, an unsupported architecture, or
            weights that aren't the model's.
    """
    if (path is None) == (config is None):
        raise ValueError(
            "model.language_model: give either 'path' (a folder with weights) or 'config' (random weights)"
        )
    if path is not None and not (Path(path) / "config.json").is_file():
        adapter = Path(path, "adapter_config.json").is_file() or Path(path, "adapter_model.safetensors").is_file()
        rule = "it must be a Hugging Face model folder" + (f", found an adapter alone; {MERGE}" if adapter else "")
        raise ValueError(f"model.language_model.path: no config.json in '{path}'; {rule}")
    if path is None or empty:
        model = untrained_language_model(path or config or {}, attention=attention, dtype=dtype, empty=empty)
    else:
        model = _read_model(path, attention, dtype)
    if resize_embeddings and vocabulary is not None:
        add_rows(model, vocabulary)
    return model


def _read_model(path: str, attention: AttentionBackend, dtype: torch.dtype) -> PreTrainedModel:
    """A model with a folder's weights, all of them and no others."""
    hf_config = load_language_model_config(path)
    where = f"model.language_model.path: the weights in '{path}'"
    try:
        stored = read_tensor_folder(path)
        _check_kind(stored)
        names = names_in_model(stored, *_own_names(hf_config), is_vision_language_folder(path))
    except WeightsError as error:
        raise WeightsError(f"{where} can't be read: {str(error).removeprefix('weights: ')}") from error
    tensors = {ours: stored[name] for name, ours in names.items()}
    if left_out := stored.keys() - names.keys():
        parts = sorted({name.removeprefix("model.").split(".")[0] for name in left_out})
        log.info("language model: %d tensors of %s in '%s' are left out", len(left_out), ", ".join(parts), path)
    if broken := not_finite(tensors):
        raise WeightsError(f"{where} must be finite; found NaN or infinity in {some(broken)}; take an undamaged copy")
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)]
    try:
        model, found = model_class.from_pretrained(
            None,
            config=hf_config,
            state_dict=dict(tensors),
            attn_implementation=STOCK,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # else it says no more than that there are some
            **{"dtype" if TRANSFORMERS_MAJOR >= 5 else "torch_dtype": dtype},
        )
    except Exception as error:  # of transformers, for sizes that don't go together
        raise WeightsError(f"{where} can't be read: {str(error).partition(chr(10))[0]}") from error
    _check_names(path, found, model, tensors)
    model.config._attn_implementation = resolve_attention(attention)
    return model


def _own_names(config: PretrainedConfig) -> tuple[str, str]:
    """A model's own name of its input embedding, and what its decoder's names begin with."""
    model = untrained_language_model(config.to_dict(), attention="sdpa", empty=True)
    names = {id(module): name for name, module in model.named_modules()}
    return f"{names[id(model.get_input_embeddings())]}.weight", f"{names[id(decoder_of(model))]}."


def _check_kind(tensors: dict[str, Tensor]) -> None:
    """Refuse what is no whole model in numbers that can be trained on."""
    if (kind := kind_of(tensors)) == "adapter":
        raise WeightsError(f"they must be a whole model's, found an adapter's; {MERGE}")
    other = {str(value.dtype).removeprefix("torch.") for name, value in tensors.items() if not COMPUTED.search(name)}
    if kind or (other := other - {"float32", "float16", "bfloat16", "float64"}):
        found = f", found {', '.join(sorted(other))}" if other and not kind else ""
        raise WeightsError(f"they must not be quantized{found}; {NOT_QUANTIZED}")


def _check_names(path: str, found: dict[str, Any], model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """Raise where transformers would leave weights random, or weights of the folder unused: it only logs that."""
    wrong = {
        "missing": sorted(map(str, found["missing_keys"])),
        "left over": sorted(name for name in map(str, found["unexpected_keys"]) if not COMPUTED.search(name)),
        "other shapes": sorted(map(_mismatch, found["mismatched_keys"])),
    }
    lists = [f"{title} ({len(keys)}): {some(keys)}" for title, keys in wrong.items() if keys]
    lists += [str(message) for message in found.get("error_msgs") or ()]
    head, embedding = tied_names(model) or ("", "")
    if {head, embedding} <= tensors.keys() and not torch.equal(tensors[head], tensors[embedding]):
        lists += [f"tie_word_embeddings is true, but {head} differs from {embedding}"]
    if lists:
        fix = "take the folder of a whole model, with the names that transformers writes"
        raise WeightsError(
            f"model.language_model.path: '{path}' doesn't fit its config.json. {'. '.join(lists)}; {fix}"
        )


def _mismatch(entry: Any) -> str:
    """A name, and from transformers 5 on its two shapes."""
    return entry if isinstance(entry, str) else f"{entry[0]}: the file has {[*entry[1]]}, the model {[*entry[2]]}"
