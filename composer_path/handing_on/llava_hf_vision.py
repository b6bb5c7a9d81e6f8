"""A vision encoder as the CLIP or SigLIP vision model of a stock LLaVA: its configuration and weights, or why not.

Stock LLaVA takes a hidden state of the tower, before any final norm; so the tokens of an encoder that ends in one can't
be said there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from composer_path.models.open_clip_trunk import OpenClipTrunk
from composer_path.models.vision_encoder import VisionEncoder
from composer_path.weights.vision_names import from_open_clip, to_hugging_face_clip

# What their MLP's activation is called there.
HIDDEN_ACT = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
BLOCK = re.compile(r"blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)")
FITS = (
    "a CLIP or SigLIP ViT whose tokens have had no final norm, such as {name: timm/vit_large_patch14_clip_336.openai, "
    "tokens: patches, kwargs: {act_layer: QuickGELU, final_norm: false}}"
)


@dataclass(frozen=True)
class StockTower:
    """Keys of `vision_config`, weights under its names, which tokens are taken, and how many stand first."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    select: str  # "default" leaves out the first token, "full" none
    num_prefix_tokens: int


def stock_tower(encoder: VisionEncoder, weights: Mapping[str, Tensor]) -> StockTower:
    """The tower that gives the same tokens, for weights by the encoder's names.

    Raises:
        ValueError: There is none; all that is in its way is named, with what would fit.
    """
    tensors = {key.removeprefix("trunk."): value for key, value in weights.items()}
    if isinstance(encoder.trunk, OpenClipTrunk):
        tensors = from_open_clip({key.removeprefix("tower."): value for key, value in tensors.items()})
    facts, has_class = encoder.facts(), "cls_token" in tensors
    wanted = {"patch_embed.proj.weight", "pos_embed"}
    wanted |= {"cls_token", "norm_pre.weight", "norm_pre.bias"} if has_class else {"patch_embed.proj.bias"}
    blocks = {key for key in tensors if BLOCK.fullmatch(key)}
    problems = _problems(encoder, tensors, wanted, blocks)
    if facts.activation not in HIDDEN_ACT:
        problems.append(f"the activation {facts.activation} (it has {', '.join(HIDDEN_ACT)})")
    if facts.norm_eps is None:
        problems.append("LayerNorms with several epsilons")
    if problems:
        where = f"vision encoder '{encoder.config['name']}'"
        raise ValueError(f"--as llava-hf: a stock LLaVA can't have the {where}: {'; '.join(problems)}; it takes {FITS}")
    dim = encoder.dim
    renamed = to_hugging_face_clip(tensors)
    dtype = tensors["pos_embed"].dtype
    # Of the pooled output only, which LLaVA doesn't use; stock models have it.
    renamed |= {"post_layernorm.weight": torch.ones(dim, dtype=dtype)}
    renamed |= {"post_layernorm.bias": torch.zeros(dim, dtype=dtype)}
    config: dict[str, Any] = {
        "model_type": "clip_vision_model" if has_class else "siglip_vision_model",
        "hidden_size": dim,
        "intermediate_size": tensors["blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": facts.depth,
        "num_attention_heads": facts.num_heads,
        "num_channels": 3,
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "hidden_act": HIDDEN_ACT[str(facts.activation)],
        "layer_norm_eps": facts.norm_eps,
        "attention_dropout": 0.0,
    }
    config |= {"projection_dim": dim} if has_class else {"vision_use_head": False}
    kept = encoder.num_kept_prefix_tokens
    select = "default" if has_class and kept == 0 else "full"
    weights = {f"vision_tower.vision_model.{key}": value for key, value in renamed.items()}
    return StockTower(config, weights, select, encoder.num_prefix_tokens)


def _problems(encoder: VisionEncoder, tensors: Mapping[str, Tensor], wanted: set[str], blocks: set[str]) -> list[str]:
    """Which parts of the encoder a stock tower lacks, and the other way round."""
    problems = []
    known = {"norm.": "a final norm", "reg_token": "registers", "ls": "LayerScale", "rope": "rotary positions"}
    left = sorted(tensors.keys() - wanted - blocks)
    for part, words in known.items():
        if found := [key for key in left if re.search(rf"(^|\.){re.escape(part)}", key)]:
            problems.append(f"it has {words} ({found[0]})")
            left = [key for key in left if key not in found]
    if left:
        problems.append(f"it has {', '.join(left[:3])}{' and others' if len(left) > 3 else ''}")
    missing = sorted(wanted - tensors.keys())
    if missing or not blocks:
        problems.append(f"it lacks {', '.join(missing or ['blocks'])}")
    per_block = {key.partition(".")[2].partition(".")[2] for key in blocks}
    if blocks and len(per_block) < 12:
        problems.append("its blocks lack biases or norms")
    grid = (encoder.image_size // encoder.patch_size) ** 2
    positions, prefix = tensors.get("pos_embed"), encoder.num_prefix_tokens
    if positions is not None and positions.shape[-2] != grid + prefix:
        problems.append(f"it has {positions.shape[-2]} positions for {grid + prefix} tokens")
    if getattr(encoder.trunk, "rope", None) is not None and not any("rotary" in problem for problem in problems):
        problems.append("it has rotary positions")
    return problems
