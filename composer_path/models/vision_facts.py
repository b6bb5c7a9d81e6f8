"""What of a vision transformer no shape of its weights tells, or that is better said in words than by shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import timm.layers
from torch import nn

from composer_path.models.open_clip_trunk import OpenClipTrunk, build_open_clip_trunk
from composer_path.models.timm_trunk import build_timm_trunk, layer_name

# An activation's names in transformers, timm and open_clip, and the one under which they are compared.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True)
class VisionFacts:
    """Facts of a ViT; None is what isn't known.

    `activation` is that of its MLP, `norm_eps` what its LayerNorms add to the variance, `rope_base` the base of rotary
    positions.
    """

    patch_size: int | None = None
    dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    activation: str | None = None
    norm_eps: float | None = None
    num_registers: int | None = None
    rope_base: float | None = None

    def differences(self, model: VisionFacts, open_clip: bool = False) -> Iterator[str]:
        """What is otherwise in a model, where both are known, with what to write in the YAML."""
        keywords = OPEN_CLIP_KEYWORDS if open_clip else {one.name: one.name for one in fields(self)} | KEYWORDS
        for fact in fields(self):
            said, has = getattr(self, fact.name), getattr(model, fact.name)
            if said is None or has is None or said == has:
                continue
            if fact.name == "norm_eps" and abs(said - has) < 1e-3 * said:
                continue
            word = keywords.get(fact.name)
            yield f"{fact.name} {said}, not {has} ({f'kwargs: {{{word}: {said}}}, or ' if word else ''}another name)"


KEYWORDS = {
    "dim": "embed_dim",
    "activation": "act_layer",
    "num_registers": "reg_tokens",
    "rope_base": "rope_temperature",
}
OPEN_CLIP_KEYWORDS = {"patch_size": "patch_size", "dim": "width", "depth": "layers"}  # the others its names decide


def facts_of(trunk: Any) -> VisionFacts:
    """Those of a trunk, read from what was built."""
    blocks = list(trunk.blocks)
    block = blocks[0] if blocks else nn.Identity()
    attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    heads = getattr(attention, "num_heads", None)
    eps = {module.eps for module in trunk.modules() if isinstance(module, nn.LayerNorm)}
    registers = None if isinstance(trunk, OpenClipTrunk) else trunk.num_prefix_tokens - (trunk.cls_token is not None)
    rope = getattr(trunk, "rope", None)
    return VisionFacts(
        patch_size=trunk.patch_size if isinstance(trunk, OpenClipTrunk) else trunk.patch_embed.patch_size[0],
        dim=trunk.embed_dim,
        depth=len(blocks),
        num_heads=heads,
        activation=_activation(mlp),
        norm_eps=eps.pop() if len(eps) == 1 else None,
        num_registers=registers,
        rope_base=getattr(rope, "temperature", None),
    )


def facts_of_timm(name: str, arguments: dict[str, Any]) -> VisionFacts:
    """Those of a timm model by name; build it on the meta device."""
    own = {key: layer_name(value) if key.endswith("_layer") else value for key, value in arguments.items()}
    return facts_of(build_timm_trunk(name, own.pop("img_size", None), own))


def facts_of_open_clip(vision: dict[str, Any], quick_gelu: bool) -> VisionFacts:
    """Those of an open_clip `vision_cfg`; build it on the meta device."""
    if vision.get("timm_model_name"):
        return facts_of_timm(vision["timm_model_name"], {"img_size": vision.get("image_size")})
    return facts_of(build_open_clip_trunk(vision, quick_gelu, vision.get("image_size", 224)))


def _activation(mlp: nn.Module | None) -> str | None:
    """Of the first activation in an MLP, under the name by which they are compared."""
    kinds: tuple[tuple[type, str], ...] = (
        (timm.layers.QuickGELU, "quick_gelu"),
        (timm.layers.GELUTanh, "gelu_tanh"),
        (nn.SiLU, "silu"),
        (nn.ReLU, "relu"),
    )
    for module in mlp.modules() if mlp is not None else ():
        if type(module).__name__ == "QuickGELU":  # open_clip's own
            return "quick_gelu"
        if isinstance(module, nn.GELU):
            return "gelu_tanh" if module.approximate == "tanh" else "gelu"
        if type(module) is timm.layers.GELU:
            return "gelu"
        for kind, name in kinds:
            if isinstance(module, kind):
                return name
    return None
