"""A tiny configuration of every language model that is taken, and of what its family has beside its defaults."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from composer_path.models.language_types import TESTED
from composer_path.models.rope_keys import TRANSFORMERS_MAJOR

WINDOW = 6
LAYERS = ["sliding_attention", "full_attention"]
SIZES = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96},
    **{"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "attention_dropout": 0.0},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "query_pre_attn_scalar": 8, "residual_dropout": 0.0},
    **{"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    **{"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},
    **dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout", "embedding_dropout"), 0.0),
}
WINDOWED = {"sliding_window": WINDOW, "layer_types": LAYERS}
# What a family has beside its defaults: windows, biases, norms of queries, multipliers, other heads.
MORE: dict[str, dict[str, dict[str, Any]]] = {
    "cohere": {"normed queries": {"use_qk_norm": True, "logit_scale": 0.5}},
    "cohere2": {"windows": WINDOWED},
    "exaone4": {"windows": WINDOWED},
    "gemma2": {"windows": WINDOWED, "strong capping": {**WINDOWED, "attn_logit_softcapping": 1.5}},
    "gemma3_text": {"windows": WINDOWED},
    "gpt2": {"other scales": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}},
    "gpt_neox": {"in a row": {"use_parallel_residual": False, "attention_bias": False}},
    "gpt_oss": {"windows": WINDOWED},
    "granite": {"multipliers": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 4.0}},
    "llama": {"biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}},
    "ministral": {"windows": WINDOWED},
    "mistral": {"a window": {"sliding_window": WINDOW}},
    "mixtral": {"a window": {"sliding_window": WINDOW}},
    "olmo": {"clipped": {"clip_qkv": 1.0}},
    "olmo3": {"windows": WINDOWED},
    "phi": {"normed queries": {"qk_layernorm": True}},
    "phi3": {"a window": {"sliding_window": WINDOW}},
    "qwen2": {"windows": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": WINDOW}},
    "qwen3": {"windows": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": WINDOW}},
    "qwen3_moe": {"windows": {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": WINDOW}},
    "smollm3": {"windows": {"use_sliding_window": True, **WINDOWED}},
    "starcoder2": {"a window": {"sliding_window": WINDOW}},
}
CASES = [(name, kind) for name in sorted(TESTED) for kind in ("plain", *MORE.get(name, ()))]


def tiny(name: str, kind: str) -> dict[str, Any]:
    """A tiny configuration of a family, as far as this transformers knows it."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {TRANSFORMERS_MAJOR} doesn't know it")
    known = set(CONFIG_MAPPING[name]().to_dict())
    keys = {key: value for key, value in SIZES.items() if key in known}
    return {"model_type": name, **keys, **MORE.get(name, {}).get(kind, {})}
