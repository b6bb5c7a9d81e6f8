"""The vision encoder: a vision transformer that gives its tokens, and everything that belongs to it.

Any ViT of timm or open_clip is here by its name, and public encoders by theirs (`encoders/table.py`). One of one's own
is a `VisionTrunk` (docs/extending.md).
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn

from composer_path.encoders.table import ENCODERS, LEFT_OUT, encoder_meant
from composer_path.models.hidden_state import end_at_layer
from composer_path.models.open_clip_trunk import (
    OpenClipTrunk,
    build_open_clip_trunk,
    open_clip_normalization,
    open_clip_vision_config,
)
from composer_path.models.timm_trunk import build_timm_trunk, layer_name
from composer_path.models.trunk import VisionTrunk
from composer_path.models.vision_facts import VisionFacts, facts_of
from composer_path.own_parts.registry import own_classes

log = logging.getLogger(__name__)

Tokens = Literal["all", "patches", "cls_patches"]
# Keywords of `timm.create_model` that this file decides, or that would fetch or unpickle files (so would open_clip's
# that begin with one of FETCHING).
RESERVED = {"num_classes", "img_size", "global_pool", "checkpoint_path", "cache_dir", "features_only"}
_MOST_BLOCKS, _MOST = 1000, 10**6  # beyond these no encoder is built in a lifetime
FETCHING = ("pretrained", "timm_", "hf_")

# Buffers of timm that are operands of a matrix product: EVA-02's and BEiT's bias of the keys, which is 0, and the
# coordinates of relative positions. Without autocast torch wants them in the weights' dtype; RoPE's tables stay fp32.
OPERANDS = {"k_bias", "rel_coords_log"}


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
        self.normalization_known = True  # not only a library's default for a name
        modules = trunk.modules()
        self._operands = [(module, name) for module in modules for name in module._buffers if name in OPERANDS]
        self.num_kept_prefix_tokens = {"all": self.num_prefix_tokens, "patches": 0, "cls_patches": 1}[tokens]

    def forward(self, images: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images tokens dim"]:
        """1. Check the size and take the weights' dtype. 2. Run the trunk. 3. Keep the tokens that are wanted.

        It calls `trunk.forward_features`, not the trunk: FSDP's unit is this module, the trunk isn't one of its own.
        `images` are normalised with `mean` and `std` already.
        """
        self.num_tokens(images.shape[-2], images.shape[-1])
        dtype = next(self.trunk.parameters()).dtype
        self._cast_operands(dtype)
        features = self.trunk.forward_features(images.to(dtype))
        kept, prefix = self.num_kept_prefix_tokens, self.num_prefix_tokens
        if kept == prefix:
            return features
        return features[:, prefix:] if kept == 0 else torch.cat([features[:, :kept], features[:, prefix:]], dim=1)

    def _cast_operands(self, dtype: torch.dtype) -> None:
        """Give the weights' dtype, which FSDP may change, to what enters products beside them without being one."""
        for module, name in self._operands:
            buffer = module._buffers[name]
            if buffer is not None and buffer.dtype != dtype:
                module._buffers[name] = buffer.to(dtype)

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

    def facts(self) -> VisionFacts:
        """What of it no shape of its weights tells: heads, activation, epsilon."""
        return facts_of(self.trunk)

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
    layer: int | None = None,
    kwargs: dict[str, Any] | None = None,
) -> VisionEncoder:
    """A vision encoder by name, with random weights.

    Args:
        name: A public encoder (`uni2-h`, `coca_vit-l`; `composer-path encoders` lists them), `timm/<name of a timm
            ViT>`, or `open_clip/<name of an open_clip model>` (its visual tower; tokens before pooling, see
            `OpenClipTrunk`).
        image_size: Side in pixels; by default the encoder's own.
        tokens: "all", "patches" or "cls_patches".
        mean: Of the images; by default the encoder's, else what timm or open_clip state for the name.
        std: Likewise.
        layer: Tokens are this hidden state, without the final norm: -1 is the last block's, -2 (LLaVA's of CLIP) the
            one before it, 1 the first's. The blocks behind it are left out. None for the last one's with its norm.
        kwargs: Further keywords of timm's ViT (`embed_dim`, `depth`, `reg_tokens`, `mlp_layer: SwiGLUPacked`,
            `act_layer: SiLU`, ...; classes by their name), `norm_eps`, or keywords of open_clip's `vision_cfg`
            (`layers`, `width`, ...). Beside a public encoder they win, and what differs from it is logged.

    Raises:
        ValueError: Unknown names or keywords, or a size that the patch size doesn't divide.
    """
    kwargs = {key: layer_name(value) if key.endswith("_layer") else value for key, value in (kwargs or {}).items()}
    try:
        check_vision_keywords(kwargs)
    except ValueError as error:
        raise ValueError(f"vision_encoder.kwargs: {error}") from None
    try:
        check_vision_name(name)
    except ValueError as error:
        raise ValueError(f"vision_encoder.name: {error}") from None
    recipe, own = ENCODERS.get(name), own_classes("vision_encoders").get(name)
    size, architecture, base = image_size, kwargs, name
    if recipe is not None:
        base, size, architecture = recipe.base, image_size or recipe.image_size, {**recipe.kwargs, **kwargs}
        if changed := [key for key in kwargs if key in recipe.kwargs and kwargs[key] != recipe.kwargs[key]]:
            words = ", ".join(f"{key} {kwargs[key]} (its own: {recipe.kwargs[key]})" for key in changed)
            log.warning("vision_encoder: '%s' is built with other keywords than it has: %s", name, words)
    family, _, model = base.partition("/")
    trunk: Any
    if own is not None:
        trunk = own(**({} if image_size is None else {"image_size": image_size}), **kwargs)
        usual, stated, size = (trunk.mean, trunk.std), True, trunk.image_size
    elif family == "timm":
        trunk = build_timm_trunk(model, size, architecture)
        timm_config = timm.get_pretrained_cfg(model)  # what timm states; None for a name without weights
        usual = (timm_config.mean, timm_config.std) if timm_config else ENCODERS["coca_vit-l"].normalization
        stated = "." in model  # a tag of weights, whose own it is; else that of the first tag
    else:
        vision, quick_gelu = open_clip_vision_config(model)
        if vision.get("timm_model_name"):
            trunk = build_timm_trunk(vision["timm_model_name"], size or vision.get("image_size"), architecture)
        else:
            size = vision.get("image_size", 224) if size is None else size
            trunk = build_open_clip_trunk({**vision, **architecture}, quick_gelu, size)
        usual, stated = open_clip_normalization(model), True
    if layer is not None:
        end_at_layer(trunk, name, layer)
    if recipe is not None:
        usual, stated = recipe.normalization, True
    size = trunk.patch_embed.img_size[0] if size is None else size
    has_one = isinstance(trunk, OpenClipTrunk | VisionTrunk)
    patch_size: int = trunk.patch_size if has_one else trunk.patch_embed.patch_size[0]
    if size % patch_size:
        raise ValueError(f"vision_encoder.image_size: must be a multiple of the patch size {patch_size}, found {size}")
    known: dict[str, Any] = {"image_size": size, "tokens": tokens}
    for key, given, default in (("mean", mean, usual[0]), ("std", std, usual[1])):
        known[key] = tuple(map(float, default if given is None else given))
        if len(known[key]) != 3:
            raise ValueError(f"vision_encoder.{key}: must be three numbers (red, green, blue), found {len(known[key])}")
        if recipe is not None and given is not None and known[key] != default:
            log.warning("vision_encoder.%s: %s, where '%s' was made with %s", key, known[key], name, default)
    config = {"name": name, **known, "kwargs": kwargs} | ({} if layer is None else {"layer": layer})
    encoder = VisionEncoder(trunk, patch_size=patch_size, **known, config=config)
    encoder.normalization_known = stated or (mean is not None and std is not None)
    return encoder


def check_vision_name(name: str) -> None:
    """A vision encoder that there is; ValueError with the name that may have been meant."""
    own = own_classes("vision_encoders")
    if name in own:
        return
    if name not in ENCODERS and (near := difflib.get_close_matches(name, own, n=1)):
        raise ValueError(f"found '{name}'; did you mean {near[0]}?")
    family, _, model = name.partition("/")
    if family == "timm" and model:
        if not timm.is_model(model):
            near = difflib.get_close_matches(model, timm.list_models("*vit*"), n=2)
            raise ValueError(f"timm has no model '{model}'" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    elif family == "open_clip" and model:
        open_clip_vision_config(model)
    elif name not in ENCODERS:
        meant = encoder_meant(name)
        if meant in LEFT_OUT:
            raise ValueError(f"'{meant}' is not in the table of encoders: {LEFT_OUT[meant]}")
        raise ValueError(
            f"unknown name '{name}'; it must be one of those that `composer-path encoders` lists, timm/<a timm ViT> "
            "or open_clip/<an open_clip model>" + (f"; did you mean {meant}?" if meant else "")
        )


def check_vision_keywords(kwargs: Mapping[str, Any]) -> None:
    """Refuse keywords that have a key of their own, would fetch or unpickle a file, or never be built; ValueError."""
    refused = sorted(key for key in map(str, kwargs) if key in RESERVED or key.startswith(FETCHING))
    if refused:
        raise ValueError(
            f"{refused} can't be given here; sizes and weights have their own keys, and nothing is fetched"
        )
    for key, value in kwargs.items():
        most = _MOST_BLOCKS if key in ("depth", "layers") else _MOST
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, int | float) and not abs(number) <= most:
                raise ValueError(f"{key} must be at most {most:,}, found {number!r:.40}; correct it")
