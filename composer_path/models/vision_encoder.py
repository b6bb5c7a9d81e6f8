"""The vision encoder: a vision transformer that gives its tokens, and everything that belongs to it.

Any ViT of timm or open_clip is here by its name. One of one's own is a `VisionTrunk` (docs/extending.md).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import timm
import timm.layers
import torch
from jaxtyping import Float
from torch import Tensor, nn

from composer_path.images.pixels import IMAGE_MEAN, IMAGE_STD
from composer_path.models.open_clip_trunk import (
    OpenClipTrunk,
    build_open_clip_trunk,
    open_clip_normalization,
    open_clip_vision_config,
)
from composer_path.models.trunk import VisionTrunk
from composer_path.own_parts.registry import own_classes

Tokens = Literal["all", "patches", "cls_patches"]
# The reference's encoder: ViT-L/16 with LayerScale, run at 448 px instead of its native 224.
COCA_VIT_L: dict[str, Any] = {"name": "vit_large_patch16_224", "image_size": 448, "kwargs": {"init_values": 1.0}}
# Keywords of `timm.create_model` that this file decides, or that would fetch or unpickle files (so would open_clip's
# that begin with one of FETCHING).
RESERVED = {"num_classes", "img_size", "global_pool", "checkpoint_path", "cache_dir", "features_only"}
FETCHING = ("pretrained", "timm_", "hf_")


class VisionEncoder(nn.Module):
    """A vision transformer without its head, together with what its users have to know about it.

    Args:
        trunk: timm's ViT or an `OpenClipTrunk`: has `blocks`, `forward_features` and `num_prefix_tokens`.
        image_size: Side of its square images, in pixels.
        patch_size: Side of a patch, in pixels.
        tokens: Which tokens are kept: "all" (as the reference), "patches", or "cls_patches" (without registers).
        mean: Of the images by channel, for pixels between 0 and 1.
        std: Likewise.
        config: Keywords that rebuild it, without its weights, through `untrained_vision_encoder`; JSON-serialisable.

    Attributes:
        dim: Width of the tokens.
    """

    def __init__(
        self,
        trunk: Any,
        *,
        image_size: int,
        patch_size: int,
        tokens: Tokens,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        config: dict[str, Any],
    ) -> None:
        super().__init__()
        if tokens not in get_args(Tokens):
            raise ValueError(f"vision_encoder.tokens: must be one of {get_args(Tokens)}, found '{tokens}'")
        self.trunk: Any = trunk  # Any: what a ViT has beyond nn.Module, no type says
        self.image_size, self.patch_size = image_size, patch_size
        self.mean, self.std = mean, std
        self.config = config
        self.dim: int = trunk.embed_dim
        has_class_token = getattr(trunk, "cls_token", None) is not None or isinstance(trunk, OpenClipTrunk)
        if tokens == "cls_patches" and not has_class_token:
            raise ValueError("vision_encoder.tokens: 'cls_patches' needs a CLS token, found none; take 'patches'")
        self.num_prefix_tokens: int = trunk.num_prefix_tokens  # CLS, then registers
        self.num_kept_prefix_tokens = {"all": self.num_prefix_tokens, "patches": 0, "cls_patches": 1}[tokens]

    def forward(self, images: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images tokens dim"]:
        """1. Check the size and take the weights' dtype. 2. Run the trunk. 3. Keep the tokens that are wanted.

        It calls `trunk.forward_features`, not the trunk: FSDP's unit is this module, the trunk isn't one of its own.
        `images` are normalised with `mean` and `std` already.
        """
        self.num_tokens(images.shape[-2], images.shape[-1])
        features = self.trunk.forward_features(images.to(next(self.trunk.parameters()).dtype))
        kept, prefix = self.num_kept_prefix_tokens, self.num_prefix_tokens
        if kept == prefix:
            return features
        return features[:, prefix:] if kept == 0 else torch.cat([features[:, :kept], features[:, prefix:]], dim=1)

    def num_tokens(self, height: int, width: int) -> int:
        """How many tokens an image of this size (in pixels) gives.

        It must be `image_size`, or with timm's `dynamic_img_size: true` any multiple of the patch size.
        """
        side, patch = self.image_size, self.patch_size
        if not getattr(self.trunk, "dynamic_img_size", False) and (height, width) != (side, side):
            raise ValueError(
                f"vision encoder: an image of {height}x{width} px, but it was built for {side}x{side}; set image_size, "
                "or for a timm ViT kwargs: {dynamic_img_size: true}"
            )
        if height % patch or width % patch:
            raise ValueError(
                f"vision encoder: sides must be multiples of its patch size {patch}, found {height}x{width} px"
            )
        return (height // patch) * (width // patch) + self.num_kept_prefix_tokens

    @property
    def blocks(self) -> nn.ModuleList:
        """Its transformer blocks: what FSDP and activation checkpointing wrap one by one."""
        return nn.ModuleList(self.trunk.blocks)


def untrained_vision_encoder(
    name: str,
    *,
    image_size: int | None = None,
    tokens: Tokens = "all",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    kwargs: dict[str, Any] | None = None,
) -> VisionEncoder:
    """A vision encoder by name, with random weights.

    Args:
        name: `coca_vit-l` (the reference's), `timm/<name of a timm ViT>`, or `open_clip/<name of an open_clip model>`
            (its visual tower; tokens before pooling, see `OpenClipTrunk`).
        image_size: Side in pixels; by default the architecture's own (448 for `coca_vit-l`).
        tokens: "all", "patches" or "cls_patches".
        mean: Of the images; by default ImageNet's for `coca_vit-l`, else what timm or open_clip state for the name.
            Pathology encoders in a timm architecture (UNI, Virchow, H-optimus) have their own: give theirs.
        std: Likewise.
        kwargs: Further keywords of timm's ViT (`embed_dim`, `depth`, `reg_tokens`, `mlp_layer: SwiGLUPacked`,
            `act_layer: SiLU`, ...; classes by their name) or of open_clip's `vision_cfg` (`layers`, `width`, ...).

    Raises:
        ValueError: Unknown names or keywords, or a size that the patch size doesn't divide.
    """
    kwargs = {key: _layer_name(value) for key, value in (kwargs or {}).items()}
    try:
        check_vision_keywords(kwargs)
    except ValueError as error:
        raise ValueError(f"vision_encoder.kwargs: {error}") from None
    trunk: Any
    own = own_classes("vision_encoders").get(name)
    library, _, model_name = name.partition("/")
    if own is not None:
        trunk = own(**({} if image_size is None else {"image_size": image_size}), **kwargs)
        normalization: tuple[Sequence[float], Sequence[float]] = trunk.mean, trunk.std
        image_size = trunk.image_size
    elif name == "coca_vit-l":
        image_size = COCA_VIT_L["image_size"] if image_size is None else image_size
        trunk = _build_timm_trunk(COCA_VIT_L["name"], image_size, {**COCA_VIT_L["kwargs"], **kwargs})
        normalization = IMAGE_MEAN, IMAGE_STD
    elif library == "timm":
        trunk = _build_timm_trunk(model_name, image_size, kwargs)
        normalization = trunk.pretrained_cfg["mean"], trunk.pretrained_cfg["std"]
    elif library == "open_clip":
        vision, quick_gelu = open_clip_vision_config(model_name)
        if vision.get("timm_model_name"):
            trunk = _build_timm_trunk(vision["timm_model_name"], image_size or vision.get("image_size"), kwargs)
        else:
            image_size = vision.get("image_size", 224) if image_size is None else image_size
            trunk = build_open_clip_trunk({**vision, **kwargs}, quick_gelu, image_size)
        normalization = open_clip_normalization(model_name)
    else:
        raise ValueError(
            f"vision_encoder.name: unknown name '{name}'; it must be 'coca_vit-l', 'timm/<timm ViT>' or "
            "'open_clip/<open_clip model>'"
        )
    size: int = trunk.patch_embed.img_size[0] if image_size is None else image_size
    has_one = isinstance(trunk, OpenClipTrunk | VisionTrunk)
    patch_size: int = trunk.patch_size if has_one else trunk.patch_embed.patch_size[0]
    if size % patch_size:
        raise ValueError(f"vision_encoder.image_size: must be a multiple of the patch size {patch_size}, found {size}")
    known: dict[str, Any] = {"image_size": size, "tokens": tokens}
    for key, given, usual in (("mean", mean, normalization[0]), ("std", std, normalization[1])):
        known[key] = tuple(map(float, usual if given is None else given))
        if len(known[key]) != 3:
            raise ValueError(f"vision_encoder.{key}: must be three numbers (red, green, blue), found {len(known[key])}")
    return VisionEncoder(trunk, patch_size=patch_size, **known, config={"name": name, **known, "kwargs": kwargs})


def check_vision_keywords(kwargs: Mapping[str, Any]) -> None:
    """Refuse keywords that have a key of their own, or would fetch or unpickle a file; ValueError."""
    refused = sorted(key for key in map(str, kwargs) if key in RESERVED or key.startswith(FETCHING))
    if refused:
        raise ValueError(
            f"{refused} can't be given here; sizes and weights have their own keys, and nothing is fetched"
        )


def _build_timm_trunk(name: str, image_size: int | None, kwargs: dict[str, Any]) -> nn.Module:
    """A ViT of timm's without head and pooling, random weights."""
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f"vision_encoder.name: timm has no model '{name}'; nearest names: {nearest}")
    settings = {key: _layer_class(value) if key.endswith("_layer") else value for key, value in kwargs.items()}
    settings |= {} if image_size is None else {"img_size": image_size}
    try:
        trunk = timm.create_model(name, pretrained=False, num_classes=0, global_pool="", **settings)
    except (TypeError, AssertionError) as error:  # an unknown keyword; sizes that timm asserts
        raise ValueError(f"vision_encoder.kwargs: timm's '{name}' doesn't take {settings}: {error}") from error
    lacking = [part for part in ("blocks", "num_prefix_tokens", "patch_embed", "embed_dim") if not hasattr(trunk, part)]
    if lacking:
        raise ValueError(
            f"vision_encoder.name: timm's '{name}' isn't a ViT whose tokens can be taken (has no {lacking})"
        )
    return trunk


def _layer_name(value: Any) -> Any:
    """A layer of timm.layers or torch.nn as its name, so that the keywords can be written to a file."""
    if not callable(value):
        return value
    for library in (timm.layers, nn):
        for name, layer in vars(library).items():
            if layer is value:  # by identity: timm's SwiGLUPacked is a partial, which has no name of its own
                return name
    raise ValueError(f"vision_encoder.kwargs: a layer must be one of timm.layers or torch.nn, found {value!r}")


def _layer_class(value: Any) -> Any:
    """A layer class from its name in timm.layers or torch.nn; other names are left for timm itself."""
    if not isinstance(value, str):
        return value
    return getattr(timm.layers, value, None) or getattr(nn, value, None) or value
