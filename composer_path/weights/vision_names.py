"""How libraries name the tensors of a ViT, each turned into timm's names, and timm's into open_clip's.

A function takes the tensors of one ViT, without their prefix, and returns them renamed. What it doesn't know keeps its
name, so that it is left over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from composer_path.weights.tensor_file import WeightsError

Tensors = dict[str, Tensor]


def from_dinov2(tensors: Tensors) -> Tensors:
    """facebookresearch/dinov2, models/vision_transformer.py: `register_tokens`, `w12`, blocks in chunks."""

    def rename(key: str) -> str:
        key = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key)  # chunk 1 of blocks of 3 holds blocks.1.3.…
        return _replaced(key, {"register_tokens": "reg_token", ".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2."})

    return _renamed(tensors, rename)


def from_dinov3(tensors: Tensors) -> Tensors:
    """facebookresearch/dinov3, models/vision_transformer.py and layers/attention.py: keys have no bias there.

    Their part of `qkv.bias` is masked by `bias_mask` in the forward pass, so it is dropped.
    """
    split: Tensors = {}
    for key, value in tensors.items():
        if key.endswith("attn.qkv.bias") and value.ndim == 1 and len(value) % 3 == 0:
            query, _, values = value.chunk(3)
            split |= {key.replace("qkv.bias", "q_bias"): query, key.replace("qkv.bias", "v_bias"): values}
        else:
            split[key] = value
    names = {"storage_tokens": "reg_token", **GAMMAS, **GATED}
    return _renamed(split, lambda key: _replaced(key, names))


def from_eva(tensors: Tensors) -> Tensors:
    """baaivision/EVA (EVA-02) and open_clip's towers of it: inner norms and a gated MLP under other names."""
    apart = any(key.endswith(".attn.q_proj.weight") for key in tensors)  # then biases belong to the projections
    biases = {"attn.q_bias": "attn.q_proj.bias", "attn.v_bias": "attn.v_proj.bias"} if apart else {}
    names = {"mlp.ffn_ln.": "mlp.norm.", "attn.inner_attn_ln.": "attn.norm.", ".mlp.w12.": ".mlp.fc1.", **GATED}
    return _renamed(tensors, lambda key: _replaced(key, {**names, **biases}))


def from_hugging_face_vit(tensors: Tensors) -> Tensors:
    """Read transformers' ViT, Dinov2 and Dinov2 with registers: `encoder.layer.N`, queries, keys and values apart.

    Since version 5 a model in memory has other names (`q_proj`, `layers.N`) than the files that it writes.
    """
    names = {
        "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
        "embeddings.cls_token": "cls_token",
        "embeddings.register_tokens": "reg_token",
        "embeddings.position_embeddings": "pos_embed",
        "encoder.layer.": "blocks.",
        "layers.": "blocks.",
        "attention.attention.": "attn.",
        "attention.output.dense.": "attn.proj.",
        "attention.o_proj.": "attn.proj.",
        "intermediate.dense.": "mlp.fc1.",
        ".output.dense.": ".mlp.fc2.",
        "layernorm_before.": "norm1.",
        "layernorm_after.": "norm2.",
        "layernorm.": "norm.",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "mlp.weights_in.": "mlp.fc1.",
        "mlp.weights_out.": "mlp.fc2.",
        "mlp.down_proj.": "mlp.fc2.",
    }
    renamed = _renamed(tensors, lambda key: _replaced(key, names))
    renamed = _fused(renamed, {part: f"attn.{part}." for part in ("query", "key", "value")})
    renamed = _fused(renamed, {part: f"attention.{part}_proj." for part in "qkv"})
    return _fused(renamed, {part: f"mlp.{part}_proj." for part in ("gate", "up")}, "mlp.fc1")


def from_hugging_face_dinov3(tensors: Tensors) -> Tensors:
    """Read transformers' DINOv3ViT: `layer.N`, no bias of keys, a plain or gated MLP."""
    gated = any(".mlp.gate_proj." in key for key in tensors)
    up = "fc1_x" if gated else "fc1"
    names = {
        "embeddings.patch_embeddings.": "patch_embed.proj.",
        "embeddings.cls_token": "cls_token",
        "embeddings.register_tokens": "reg_token",
        "attention.o_proj.": "attn.proj.",
        "attention.q_proj.bias": "attn.q_bias",
        "attention.v_proj.bias": "attn.v_bias",
        "layer_scale1.lambda1": "gamma_1",
        "layer_scale2.lambda1": "gamma_2",
        ".mlp.gate_proj.": ".mlp.fc1_g.",
        ".mlp.up_proj.": f".mlp.{up}.",
        ".mlp.down_proj.": ".mlp.fc2.",
    }
    renamed = _renamed(tensors, lambda key: re.sub(r"^(model\.)?layer\.", "blocks.", _replaced(key, names)))
    return _fused(renamed, {part: f"attention.{part}_proj." for part in "qkv"})


def from_hugging_face_clip(tensors: Tensors) -> Tensors:
    """Read transformers' CLIP and SigLIP vision models: `encoder.layers.N`; CLIP's is `pre_layrnorm` indeed."""
    names = {theirs: timm for timm, theirs in HUGGING_FACE_CLIP.items()}
    renamed = _renamed(tensors, lambda key: _replaced(key, names))
    return _in_timm_shapes(_fused(renamed, {part: f"self_attn.{part}_proj." for part in "qkv"}))


def to_hugging_face_clip(tensors: Tensors) -> Tensors:
    """Rename timm's CLIP or SigLIP as transformers names it, queries, keys and values apart."""
    apart: Tensors = {}
    for key, value in tensors.items():
        if ".attn.qkv." in key:
            apart |= {key.replace("attn.qkv.", f"self_attn.{part}_proj."): third for part, third in _thirds(value)}
        else:
            apart[key] = value
    renamed = _renamed(apart, lambda key: _replaced(key, HUGGING_FACE_CLIP))
    for key, axes in (("embeddings.class_embedding", 1), ("embeddings.position_embedding.weight", 2)):
        while key in renamed and renamed[key].ndim > axes and len(renamed[key]) == 1:
            renamed[key] = renamed[key][0]
    return renamed


def _thirds(value: Tensor) -> list[tuple[str, Tensor]]:
    return list(zip("qkv", value.chunk(3), strict=True))


def from_open_clip(tensors: Tensors) -> Tensors:
    """open_clip's (and OpenAI's) vision transformer."""
    names = {ours: timm for timm, ours in OPEN_CLIP.items()}
    return _in_timm_shapes(_renamed(tensors, lambda key: _replaced(key, names)))


def to_open_clip(tensors: Tensors) -> Tensors:
    """Rename timm's CLIP as open_clip names it."""
    renamed = _renamed(tensors, lambda key: _replaced(key, OPEN_CLIP))
    for key, axes in (("class_embedding", 1), ("positional_embedding", 2)):
        while key in renamed and renamed[key].ndim > axes and len(renamed[key]) == 1:
            renamed[key] = renamed[key][0]
    return renamed


def from_beit3(tensors: Tensors) -> Tensors:
    """Read torchscale's BEiT-3, which MUSK is: branch A sees images, branch B text; positions count from 2.

    lilab-stanford/MUSK, musk/modeling.py and musk/torchscale/.
    """
    names = {
        "vision_embed.cls_token": "cls_token",
        "vision_embed.": "patch_embed.",
        "encoder.embed_positions.weight": "pos_embed",
        "encoder.layer_norm.": "norm.",
        "encoder.layers.": "blocks.",
        "self_attn_layer_norm.": "norm1.",
        "final_layer_norm.": "norm2.",
        "self_attn.inner_attn_ln.": "attn.norm.",
        "self_attn.out_proj.": "attn.proj.",
        "ffn.ffn_layernorm.": "mlp.norm.",
        ".ffn.": ".mlp.",
    }
    seen = {key.replace(".A.", "."): value for key, value in tensors.items() if ".A." in key or ".B." not in key}
    renamed = _renamed(seen, lambda key: _replaced(key, names))
    if "pos_embed" in renamed and renamed["pos_embed"].ndim == 2:
        renamed["pos_embed"] = renamed["pos_embed"][2:].unsqueeze(0)
    return _fused(renamed, {part: f"self_attn.{part}_proj." for part in "qkv"})


# timm's names of the parts of a CLIP, and transformers'
HUGGING_FACE_CLIP = {
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding.weight",
    "norm_pre.": "pre_layrnorm.",
    "norm.": "post_layernorm.",
    "blocks.": "encoder.layers.",
    "attn.proj.": "self_attn.out_proj.",
    "norm1.": "layer_norm1.",
    "norm2.": "layer_norm2.",
}
# timm's names, and open_clip's
OPEN_CLIP = {
    "patch_embed.proj.": "conv1.",
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
    "norm_pre.": "ln_pre.",
    "blocks.": "transformer.resblocks.",
    "attn.qkv.weight": "attn.in_proj_weight",
    "attn.qkv.bias": "attn.in_proj_bias",
    "attn.proj.": "attn.out_proj.",
    "norm1.": "ln_1.",
    "norm2.": "ln_2.",
    "ls1.": "ls_1.",
    "ls2.": "ls_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "norm.": "ln_post.",
}
GAMMAS = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
GATED = {".mlp.w1.": ".mlp.fc1_g.", ".mlp.w2.": ".mlp.fc1_x.", ".mlp.w3.": ".mlp.fc2."}


def _renamed(tensors: Tensors, rename: Callable[[str], str]) -> Tensors:
    """Tensors under other names, of which no two may be the same."""
    renamed: dict[str, tuple[str, Tensor]] = {}
    for key, value in tensors.items():
        if (new := rename(key)) in renamed:
            raise WeightsError(
                f"weights: '{key}' and '{renamed[new][0]}' are both the model's '{new}'; keep one of them"
            )
        renamed[new] = key, value
    return {new: value for new, (_, value) in renamed.items()}


def _replaced(key: str, names: Mapping[str, str]) -> str:
    """A key with every part renamed, each place once: a part begins the key or follows a dot."""
    wanted = "|".join(rf"(?:(?<=\.)|^){re.escape(old.removeprefix('.'))}" for old in names)
    by_part = {old.removeprefix("."): new.removeprefix(".") for old, new in names.items()}
    return re.sub(wanted, lambda found: by_part[found[0]], key)


def _fused(tensors: Tensors, parts: Mapping[str, str], whole: str = "attn.qkv") -> Tensors:
    """Parts of a block in one tensor, as timm has queries, keys and values, where all are there and fit together."""
    result: Tensors = {}
    found: dict[tuple[str, str], dict[str, tuple[str, Tensor]]] = {}
    for key, value in tensors.items():
        match = re.fullmatch(rf"(blocks\.\d+\.)({'|'.join(map(re.escape, parts.values()))})(weight|bias)", key)
        if match is None:
            result[key] = value
        else:
            found.setdefault((match[1], match[3]), {})[match[2]] = (key, value)
    for (block, kind), three in found.items():
        values = [three[part][1] for part in parts.values() if part in three]
        if len(values) == len(parts) and _fit(values):
            result[f"{block}{whole}.{kind}"] = torch.cat(values)
        else:
            result |= dict(three.values())
    return result


def _fit(values: Sequence[Tensor]) -> bool:
    return len({(value.ndim, value.shape[1:], value.dtype) for value in values}) == 1 and values[0].ndim > 0


def _in_timm_shapes(tensors: Tensors) -> Tensors:
    """CLS and positions with the axes that timm gives them."""
    for key, axes in (("cls_token", 3), ("pos_embed", 3)):
        if key in tensors and 0 < tensors[key].ndim < axes:
            tensors[key] = tensors[key][(None,) * (axes - tensors[key].ndim)]
    return tensors
