"""A language model's configuration as transformers 4 and 5 both read it, and what ends its answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedTokenizerBase

from composer_path.models.rope_keys import old_rope_keys
from composer_path.records.tokenize import TextPreparation


def stock_config(config: PretrainedConfig) -> dict[str, Any]:
    """Keys of `config.json` for a language model alone; its RoPE in the words that both versions know."""
    keys: dict[str, Any] = json.loads(config.to_json_string())
    for name in ("transformers_version", "torch_dtype", "dtype", "_name_or_path", "_attn_implementation"):
        keys.pop(name, None)
    rope = keys.get("rope_parameters") or {}
    if rope and not any(isinstance(value, Mapping) for value in rope.values()):
        del keys["rope_parameters"]
        keys |= old_rope_keys(rope)
    keys["vocab_size"] = config.vocab_size
    keys["model_type"] = config.model_type
    keys["tie_word_embeddings"] = bool(config.tie_word_embeddings)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    keys["architectures"] = [model_class.__name__]
    return keys


def dtype_word(weights: Mapping[str, Tensor]) -> str:
    """The widest dtype of weights, in the words of a configuration; in it none loses anything."""
    dtypes = {value.dtype for value in weights.values() if value.is_floating_point()}
    wide = torch.float32 if len(dtypes) != 1 else dtypes.pop()
    return str(wide).removeprefix("torch.")


def generation_config(text: TextPreparation, tokenizer: PreTrainedTokenizerBase, **more: Any) -> dict[str, Any]:
    """Keys of `generation_config.json`: greedy, ended by what ends `composer-path ask`'s answers."""
    keys: dict[str, Any] = {"do_sample": False, "eos_token_id": text.end_ids(tokenizer)}
    keys["pad_token_id"] = tokenizer.pad_token_id or 0
    if tokenizer.bos_token_id is not None:
        keys["bos_token_id"] = tokenizer.bos_token_id
    return keys | more
