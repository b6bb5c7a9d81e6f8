"""open_clip's own vision transformer (the visual tower of its CLIP and CoCa models) as a giver of tokens."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer
else:
    VisionTransformer = Any  # open_clip is needed by its own towers only, in folders that carry this code


class OpenClipTrunk(nn.Module):
    """All tokens (CLS first, then patches) of an open_clip vision transformer, before any pooling.

    Which norm the tokens have had follows `VisionTransformer._pool` in open_clip/transformer.py. A CLIP tower applies
    `ln_post` to the tokens and then picks one: here they come after `ln_post`. A CoCa tower pools the raw tokens by
    attention, and its `ln_post` belongs to the pooled ones: here they come without it. The same holds for towers that
    normalise after averaging (`final_ln_after_pool`). What lies behind the tokens (pooler, projection) is dropped: the
    tower is taken over, not copied.
    """

    num_prefix_tokens = 1

    def __init__(self, tower: VisionTransformer) -> None:
        super().__init__()
        if tower.attn_pool is not None or tower.final_ln_after_pool:
            tower.ln_post = nn.Identity()
        tower.attn_pool = None
        tower.attn_pool_contrastive = None
        tower.proj = None
        self.tower = tower
        self.embed_dim: int = tower.conv1.out_channels
        self.patch_size: int = tower.patch_size[0]

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks."""
        return self.tower.transformer.resblocks

    def forward_features(self, images: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images tokens dim"]:
        """1. Patches. 2. CLS in front, positions added, first norm. 3. Blocks. 4. `ln_post`, where it stays."""
        tower = self.tower
        patches = tower.conv1(images).flatten(2).transpose(1, 2)
        class_token = tower.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        tokens = torch.cat([class_token, patches], dim=1) + tower.positional_embedding.to(patches.dtype)
        tokens = tower.transformer(tower.ln_pre(tokens))
        return tower.ln_post(tokens)


def open_clip_vision_config(name: str) -> tuple[dict[str, Any], bool]:
    """The `vision_cfg` of an open_clip model by name, and whether the model uses QuickGELU."""
    import open_clip

    if name not in open_clip.list_models():
        nearest = difflib.get_close_matches(name, open_clip.list_models(), n=3)
        known = f"; nearest names: {', '.join(nearest)}" if nearest else ""
        raise ValueError(f"open_clip has no model '{name}'{known}")
    config = open_clip.get_model_config(name)
    vision = dict(config["vision_cfg"])
    if isinstance(vision.get("layers"), (list, tuple)):
        raise ValueError(f"open_clip's '{name}' has a ResNet tower, which has no tokens; take a ViT")
    return vision, bool(config.get("quick_gelu", False))


def open_clip_normalization(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of an open_clip model: those of its pretrained tags if they agree, else CLIP's own.

    open_clip attaches them to weights, not to models; give `mean` and `std` where they matter and the tags differ.
    """
    import open_clip

    tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    found = {(tuple(tag["mean"]), tuple(tag["std"])) for tag in tags if tag.get("mean") and tag.get("std")}
    own = tuple(open_clip.OPENAI_DATASET_MEAN), tuple(open_clip.OPENAI_DATASET_STD)
    return found.pop() if len(found) == 1 else own


def build_open_clip_trunk(vision: dict[str, Any], quick_gelu: bool, image_size: int) -> OpenClipTrunk:
    """The trunk of a `vision_cfg` at `image_size` pixels, random weights."""
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    # Patch dropout belongs to contrastive pretraining; here it would change the number of tokens between steps.
    settings = {**vision, "image_size": image_size, "patch_dropout": 0.0, "output_tokens": False}
    known = CLIPVisionCfg.__dataclass_fields__
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"vision_encoder.kwargs: open_clip's vision_cfg has no {unknown}; known are {sorted(known)}")
    # The output projection is dropped, so its width (the first argument) matters only to a pooler, dropped as well.
    heads = settings.get("attn_pooler_heads", 8)
    return OpenClipTrunk(_build_vision_tower(heads, CLIPVisionCfg(**settings), quick_gelu))
