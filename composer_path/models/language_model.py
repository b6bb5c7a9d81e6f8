"""The language model: any causal language model of transformers whose attention can be ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from composer_path.models.attention import AttentionBackend, check_attention_supported, resolve_attention
from composer_path.models.rope_keys import read_rope_parameters

# Far beyond any model: a slip of the keyboard would otherwise build for hours.
MOST = {"hidden_size": 10**6, "intermediate_size": 10**7, "vocab_size": 10**7, "num_hidden_layers": 10**3}
MOST |= dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 10**4) | {"max_position_embeddings": 10**9}


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
    with empty_parameters(enabled=empty):
        model = AutoModelForCausalLM.from_config(hf_config, attn_implementation=resolve_attention(attention))
    return cast_parameters(model, dtype)


def load_language_model_config(source: dict[str, Any] | str | None) -> PretrainedConfig:
    """A configuration from a folder, a `config.json` or YAML keys; refused where padding-free attention can't serve."""
    if isinstance(source, str):
        if not Path(source).exists():
            raise ValueError(f"model.language_model: '{source}' does not exist")
        _check_plain(Path(source))
        build = partial(AutoConfig.from_pretrained, source, local_files_only=True, trust_remote_code=False)
    else:
        keys = deepcopy(dict(source or {}))  # transformers 5 writes into nested settings
        if "model_type" not in keys:
            raise ValueError("model.language_model.config: 'model_type' is missing (llama, mistral, qwen2, ...)")
        _check_causal("model.language_model.config", keys["model_type"])
        build = partial(AutoConfig.for_model, keys.pop("model_type"), **keys)
    try:
        hf_config = build()
    except Exception as error:  # each model has its own checks, with errors of their own
        why = " ".join((str(error) or type(error).__name__).split())
        raise ValueError(f"model.language_model: transformers refuses this configuration: {why}") from None
    _check_sizes(hf_config)
    read_rope_parameters(hf_config)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(hf_config), None)
    if not getattr(model_class, "_supports_attention_backend", False):
        raise ValueError(
            f"language model '{hf_config.model_type}' does not go through transformers' attention interface: the "
            "samples of a padding-free row would see each other; choose one that does (LLaMA, Mistral, Qwen, ...)"
        )
    check_attention_supported(hf_config)
    return hf_config


def _check_plain(path: Path) -> None:
    """Refuse a configuration that needs code of its own, or sends transformers to other weights than the folder's."""
    folder, file = (path, path / "config.json") if path.is_dir() else (path.parent, path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        model_type = content.get("model_type")
    except (ValueError, AttributeError, RecursionError) as error:
        fix = "take a folder that transformers wrote"
        raise ValueError(f"'{file}': must be a model's configuration; found {type(error).__name__}; {fix}") from None
    code = " with code of its own (auto_map), which is never run" if "auto_map" in content else ""
    _check_causal(f"'{file}'", model_type, code)
    if "transformers_weights" in content:
        raise ValueError(f"'{file}': must not name other weights (transformers_weights); take that key out")
    if path.is_dir() and (folder / "adapter_config.json").exists():
        raise ValueError(f"'{folder}': must hold a whole model, found adapter_config.json; merge the adapter into it")


def _check_causal(where: str, model_type: Any, code: str = "") -> None:
    """Refuse, before its class sees a key, what is no language model: some other classes load further folders."""
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        found = f"found {str(model_type)!r}{code}"
        raise ValueError(f"{where}: model_type must be one that transformers knows, {found}; take another model")
    if CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{where}: model_type must be a causal language model's, found {model_type!r}; take another")


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


def decoder_blocks(language_model: nn.Module) -> nn.ModuleList:
    """The transformer blocks of a Hugging Face causal language model: what FSDP and checkpointing wrap one by one."""
    blocks = getattr(language_model.base_model, "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        name = type(language_model).__name__
        raise ValueError(f"language model {name}: its blocks are not found at base_model.layers")
    return blocks


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> Any:
    """Cast the parameters only: `module.to(bfloat16)` would cast RoPE's `inv_freq` too, 5 rad off at position 4,095."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


@contextmanager
def empty_parameters(enabled: bool = True) -> Iterator[None]:
    """Within this context, modules are built with parameters on the meta device and real buffers."""
    if not enabled:
        yield
        return
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and not param.is_meta:  # one that is already empty may be tied: keep the same object
            module._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
