"""LoRA (arXiv 2106.09685) by peft: small matrices learn beside frozen ones, and are added to them when all is done.

peft makes the layers; merging and peft's own file format are here, on plain tensors, as weights may be sharded.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from composer_path.models.language_types import decoder_blocks

ADAPTER = "default"  # peft's name of an only adapter, which stands in the names of its weights
NEEDED = "needs the package peft (pip install composer_path[lora])"


def has_peft() -> bool:
    """Whether peft is installed."""
    return find_spec("peft") is not None


def add_adapters(model: Any, chosen: Mapping[str, Mapping[str, Any]], seed: int) -> None:
    """Put adapters into a `PathMLLM` whose trained weights are chosen: keywords of `add_lora` by module."""
    for at, name in enumerate(sorted(chosen)):
        part = getattr(model, name)
        blocks = decoder_blocks(part) if name == "language_model" else part.blocks
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + at)
            add_lora(part, blocks, where=f"model.lora.{name}", **chosen[name])
    model.adapters = tuple(_units(model))


def add_lora(
    module: Any,
    blocks: Iterable[nn.Module],
    *,
    where: str,
    r: int = 8,
    lora_alpha: int | float = 8,
    lora_dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
) -> None:
    """Put adapters beside linear layers of a module's blocks; they are fp32 and all of it that learns.

    Args:
        module: A language model or a vision encoder; changed in place.
        blocks: Its blocks.
        where: The key of the YAML, for errors.
        r: Rank.
        lora_alpha: What is learned is scaled by `lora_alpha / r`.
        lora_dropout: Of what goes into the adapters; its random numbers differ with the number of ranks.
        target_modules: Last words of the layers' names, such as `q_proj`; None for all linear layers of the blocks.
        use_rslora: Scale by `lora_alpha / sqrt(r)` instead (arXiv 2312.03732).
        use_dora: Learn the length of each row apart (arXiv 2402.09353). Blocks are then held in fp32.

    Raises:
        ValueError: peft isn't installed, or a target is no linear layer of the blocks.
    """
    if not has_peft():
        raise ValueError(f"{where}: {NEEDED}")
    from peft import LoraConfig, inject_adapter_in_model

    linear = _linear_layers(module, blocks)
    words = sorted({name.rpartition(".")[2] for name in linear})
    for target in target_modules or ():
        if target not in words:
            near = difflib.get_close_matches(target, words, n=1)
            fix = f"did you mean {near[0]}?" if near else f"there are {', '.join(words) or 'none'}"
            raise ValueError(f"{where}.target_modules: the blocks have no linear layer '{target}'; {fix}")
    chosen = [name for name in linear if target_modules is None or name.rpartition(".")[2] in target_modules]
    if not chosen:
        raise ValueError(f"{where}: found no linear layer in the blocks; leave it out")
    keywords: dict[str, Any] = {
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "use_rslora": use_rslora,
    }
    config = LoraConfig(**keywords, use_dora=use_dora, target_modules=chosen, bias="none")
    try:
        inject_adapter_in_model(config, module, adapter_name=ADAPTER)
    except ImportError as error:  # it knows other packages, and refuses some versions of theirs
        raise ValueError(f"{where}: peft {version('peft')} refuses: {error}; take another version of peft") from None
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        if is_adapter(name):
            parameter.data = parameter.data.float()


def is_adapter(name: str) -> bool:
    """Whether a parameter is one of an adapter's."""
    return any(part in name for part in (".lora_A.", ".lora_B.", ".lora_magnitude_vector."))


def _units(model: nn.Module) -> list[nn.Module]:
    """Adapters as FSDP units of their own: a unit holds one dtype, and what they stand beside needn't be fp32.

    DoRA's read each other's weights, and stay in their block's unit.
    """
    layers: list[Any] = [layer for layer in model.modules() if ADAPTER in getattr(layer, "lora_A", ())]
    pairs = [(layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]) for layer in layers if not is_dora(layer)]
    return [part for pair in pairs for part in pair]


def plain_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights without those of adapters, under the names of a module without any."""
    return {name.replace(".base_layer.", "."): tensor for name, tensor in weights.items() if not is_adapter(name)}


def merged(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights with what its adapters learned, under the names of the model without adapters; sums in fp32."""
    if not any(map(is_adapter, weights)):  # merged before, or there are none
        return dict(weights)
    plain = plain_weights(weights)
    layers: list[tuple[str, Any]] = list(model.named_modules())
    for name, layer in layers:
        if ADAPTER not in getattr(layer, "lora_A", ()):
            continue
        first, second = (weights[f"{name}.lora_{half}.{ADAPTER}.weight"].float() for half in "AB")
        summed = weights[f"{name}.base_layer.weight"].float() + layer.scaling[ADAPTER] * (second @ first)
        if is_dora(layer):
            length = weights[f"{name}.lora_magnitude_vector.{ADAPTER}.weight"].float()
            summed = summed * (length / torch.linalg.norm(summed, dim=1))[:, None]
        plain[f"{name}.weight"] = summed
    return plain


def peft_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters among a module's weights, under the names of peft's `adapter_model.safetensors`."""
    found = {}
    for name, tensor in weights.items():
        if is_adapter(name):
            own = name.replace(f".{ADAPTER}.", ".")
            found["base_model.model." + own.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")] = tensor
    return found


def peft_config(module: Any) -> dict[str, Any]:
    """Peft's description of a module's adapters, for `adapter_config.json`; empty where it has none."""
    config = getattr(module, "peft_config", {}).get(ADAPTER)
    if config is None:
        return {}
    found = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return found | {"inference_mode": True}


def is_dora(layer: Any) -> bool:
    """Whether one of peft's layers learns lengths of rows too."""
    return bool(layer.use_dora.get(ADAPTER))


def _linear_layers(module: nn.Module, blocks: Iterable[nn.Module]) -> list[str]:
    """Names of the linear layers in the blocks; `nn.MultiheadAttention` reads its own's weights past their forward."""
    within = {id(child) for block in blocks for child in block.modules()}
    passed = [child for child in module.modules() if isinstance(child, nn.MultiheadAttention)]
    within -= {id(child) for attention in passed for child in attention.modules()}
    return [name for name, child in module.named_modules() if id(child) in within and isinstance(child, nn.Linear)]
