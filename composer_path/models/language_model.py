"""The language model: any causal language model of transformers whose attention can be ours."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from composer_path.models.attention import AttentionBackend, resolve_attention
from composer_path.models.language_types import check_attention_supported
from composer_path.models.parameters import cast_parameters, empty_parameters
from composer_path.models.rope_keys import check_rope_known, read_rope_parameters
from composer_path.storage.json_object import file_inside, read_json_object

# Far beyond any model: a slip of the keyboard would otherwise build for hours.
MOST = {"hidden_size": 10**6, "intermediate_size": 10**7, "vocab_size": 10**7, "num_hidden_layers": 10**3}
MOST |= dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 10**4) | {"max_position_embeddings": 10**9}

# Vision-language models whose folder has a language model in it, and its type where `text_config` doesn't say it.
WRAPPERS = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_next": "llama",
    "gemma3": "gemma3_text",
    "composer_path": "",
}
# LLaVA's own configuration has its LLaMA's keys beside others, which are about images, training and generation.
# fmt: off
LLAMA_KEYS = frozenset((
    "vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "attention_dropout", "mlp_bias",
    "hidden_act", "rms_norm_eps", "initializer_range", "rope_theta", "rope_scaling", "rope_parameters",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
))
# fmt: on
STOCK = "eager"  # what a model is built with: transformers looks at what our names have in them
MERGE = "merge the adapter into its base model (peft: merge_and_unload, then save_pretrained) and name that folder"
NOT_QUANTIZED = "take its weights in bf16 or fp32"


def untrained_language_model(
    config: dict[str, Any] | str,
    *,
    attention: AttentionBackend = "auto",
    dtype: torch.dtype = torch.float32,
    empty: bool = False,
) -> PreTrainedModel:
    """A causal language model with random weights, whose attention is padding-free.

    Args:
        config: Configuration keys (`model_type: llama`, `hidden_size: ...`), or the path of a `config.json`.
        attention: See `composer_path.models.attention.resolve_attention`.
        dtype: Of the weights; buffers (RoPE's frequencies) always stay fp32.
        empty: Parameters on the meta device, for ranks that receive the weights, or where they are loaded afterwards.
    """
    hf_config = load_language_model_config(config)
    kernel = resolve_attention(attention)
    try:
        with empty_parameters(enabled=empty):
            model = AutoModelForCausalLM.from_config(hf_config, attn_implementation=STOCK)
    except Exception as error:  # sizes and settings that don't go together
        raise ValueError(f"model.language_model: can't be built of this configuration: {_why(error)}") from error
    model.config._attn_implementation = kernel
    return cast_parameters(model, dtype)


def load_language_model_config(source: dict[str, Any] | str | None) -> PretrainedConfig:
    """A configuration from a folder, a `config.json` or YAML keys; refused where padding-free attention can't serve.

    Of a vision-language model's folder it is that of its language model.
    """
    if isinstance(source, str):
        keys = read_config_file(source)
        build = partial(CONFIG_MAPPING[keys["model_type"]].from_dict, keys)
    else:
        keys = deepcopy(dict(source or {}))  # transformers 5 writes into nested settings
        if "model_type" not in keys:
            raise ValueError("model.language_model.config: 'model_type' is missing (llama, mistral, qwen2, ...)")
        _check_causal("model.language_model.config", keys["model_type"])
        build = partial(AutoConfig.for_model, keys.pop("model_type"), **keys)
    try:
        hf_config: PretrainedConfig = build()
    except Exception as error:  # each model has its own checks, with errors of their own
        raise ValueError(f"model.language_model: transformers refuses this configuration: {_why(error)}") from None
    _check_sizes(hf_config)
    read_rope_parameters(hf_config)
    check_rope_known(hf_config)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(hf_config), None)
    if not getattr(model_class, "_supports_attention_backend", False):
        raise ValueError(
            f"language model '{hf_config.model_type}' does not go through transformers' attention interface: the "
            "samples of a padding-free row would see each other; choose one that does (LLaMA, Mistral, Qwen, ...)"
        )
    check_attention_supported(hf_config)
    return hf_config


def read_config_file(source: str) -> dict[str, Any]:
    """The keys of a language model's `config.json`; of a vision-language model's, those of its `text_config`.

    Raises:
        ValueError: No such file or malformed; code of its own, other weights, an adapter, or no language model.
    """
    path = Path(source)
    if not path.exists():
        raise ValueError(f"model.language_model: '{source}' does not exist")
    if path.is_dir() and (path / "adapter_config.json").exists():
        raise ValueError(f"'{path}': must hold a whole model, found adapter_config.json; {MERGE}")
    file = file_inside(path, "config.json") if path.is_dir() else path
    keys = read_json_object(file)
    if "transformers_weights" in keys:
        raise ValueError(f"'{file}': must not name other weights (transformers_weights); take that key out")
    code = " with code of its own (auto_map), which is never run" if keys.pop("auto_map", None) else ""
    model_type = keys.get("model_type")
    if isinstance(model_type, str) and model_type in WRAPPERS:
        text = keys.get("text_config", keys.get("language_model"))  # the latter in our first version
        if text is None and "mm_projector_type" in keys:
            text = {key: value for key, value in keys.items() if key in LLAMA_KEYS and value is not None}
        if not isinstance(text, dict):
            rule = f"of model_type {model_type!r} must have a text_config, its language model's configuration"
            raise ValueError(f"'{file}': {rule}; found {type(text).__name__}; take a folder that transformers wrote")
        outer = {key: keys[key] for key in ("tie_word_embeddings", "quantization_config") if key in keys}
        keys = {"model_type": WRAPPERS[model_type]} | outer | text
        keys.pop("auto_map", None)
        file = Path(f"{file} (text_config)")
    _check_causal(f"'{file}'", keys.get("model_type"), code)
    if keys.get("quantization_config"):
        raise ValueError(f"'{file}': its weights must not be quantized; {NOT_QUANTIZED}")
    for key in ("vocab_size", "tie_word_embeddings"):
        if key in keys and type(keys[key]) is not (int if key == "vocab_size" else bool):
            raise ValueError(f"'{file}': {key} must not be {keys[key]!r:.60}; correct it")
    return keys


def is_vision_language_folder(source: str) -> bool:
    """Whether a folder's configuration is that of a vision-language model, with a language model in it."""
    return read_json_object(Path(source, "config.json")).get("model_type") in WRAPPERS


def _check_causal(where: str, model_type: Any, code: str = "") -> None:
    """Refuse, before its class sees a key, what is no language model: some other classes load further folders."""
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        found = f"found {str(model_type)!r:.80}{code}"
        raise ValueError(f"{where}: model_type must be one that transformers knows, {found}; take another model")
    if CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{where}: model_type must be a causal language model's, found {model_type!r}; take another")


def _why(error: Exception) -> str:
    """What an error of transformers says, in one line."""
    first = error.args[0] if error.args else type(error).__name__  # a KeyError would put it in quotes
    said = " ".join(str(first if isinstance(first, str) else error).split())
    name = f"{type(error).__name__}: " if isinstance(error, LookupError) and " " not in said else ""
    return f"{name}{said!r:.300}" if name else f"{said:.500}"


def _check_sizes(config: PretrainedConfig) -> None:
    """Refuse sizes of which no model can be built; transformers looks at few of them."""
    for name, most in MOST.items():
        value = getattr(config, name, None)
        if value is not None and not (type(value) is int and 1 <= value <= most):
            rule = f"{name} must be a whole number from 1 to {most:,}"
            raise ValueError(f"model.language_model: {rule}, found {value!r}; correct it")
    width, heads = getattr(config, "hidden_size", 1), getattr(config, "num_attention_heads", 1)
    if (sharing := getattr(config, "num_key_value_heads", None)) is not None and heads % sharing:
        rule = f"num_attention_heads must be a multiple of num_key_value_heads, found {heads} and {sharing}"
        raise ValueError(f"model.language_model: {rule}; correct it")
    if width % heads and getattr(config, "head_dim", None) in (None, width // heads):
        rule = f"hidden_size must be a multiple of num_attention_heads, found {width} and {heads}"
        raise ValueError(f"model.language_model: {rule}; correct it")
