"""A vision transformer that ends before its last block, as LLaVA takes CLIP's: what lies behind isn't there."""

from __future__ import annotations

from typing import Any

from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from composer_path.models.open_clip_trunk import OpenClipTrunk


def end_at_layer(trunk: Any, name: str, layer: int) -> None:
    """Cut a trunk so that its tokens are a hidden state, without the final norm; changed in place.

    Args:
        trunk: timm's ViT or an `OpenClipTrunk`.
        name: Of the encoder, for errors.
        layer: In transformers' numbers: -1 is what the last block gives, -2 the one before it; or from the front, 1 is
            what the first gives.

    Raises:
        ValueError: It has no such block, or is of a kind whose tokens don't come from its blocks alone.
    """
    if not isinstance(trunk, OpenClipTrunk | VisionTransformer | Eva | Beit):
        rule = "is for timm's ViTs and open_clip's"
        raise ValueError(f"vision_encoder.layer: {rule}, found '{name}'; leave it out, or take another encoder")
    blocks = len(trunk.blocks)
    depth = layer if layer > 0 else blocks + 1 + layer
    if not 1 <= depth <= blocks:
        rule = f"must be from -{blocks} to -1, or from 1 to {blocks}, for the {blocks} blocks of '{name}'"
        raise ValueError(f"vision_encoder.layer: {rule}; found {layer}")
    if isinstance(trunk, OpenClipTrunk):
        trunk.tower.transformer.resblocks = trunk.tower.transformer.resblocks[:depth]
        trunk.tower.ln_post = nn.Identity()
    else:
        trunk.blocks, trunk.norm = trunk.blocks[:depth], nn.Identity()
