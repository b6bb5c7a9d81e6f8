"""Position embeddings for another image size, as the library that made the file would resample them."""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, cat

from composer_path.weights.tensor_file import WeightsError

log = logging.getLogger(__name__)


class Resampling(NamedTuple):
    """How one library resamples a grid of positions.

    `offset` is added to the new side, and the scale computed from that: DINO's and DINOv2's habit
    (https://github.com/facebookresearch/dino/issues/8). `by_way_of` is a side that is resampled to first, bilinearly.
    """

    mode: str = "bicubic"
    antialias: bool = True
    offset: float = 0.0
    by_way_of: int | None = None


# timm/layers/pos_embed.py, resample_abs_pos_embed; open_clip/model.py, resize_pos_embed
ANTIALIASED = Resampling()
# transformers, interpolate_pos_encoding of ViT, Dinov2, CLIP and SigLIP; musk/utils.py
PLAIN_BICUBIC = Resampling(antialias=False)
# facebookresearch/dinov2, hub/backbones.py: without registers; with them it is ANTIALIASED
DINO_OFFSET = Resampling(antialias=False, offset=0.1)
# mahmoodlab/CONCH, conch/open_clip_custom/coca_model.py, resize_pos_embed
CONCH = Resampling("bilinear", antialias=False)
# mahmoodlab/TRIDENT, model_zoo/conchv1_5/conchv1_5.py: the file is brought to 224 px (bilinear), where the model is
# built, and from there to the image's size in the forward pass
CONCH_V1_5 = Resampling(antialias=False, offset=0.1, by_way_of=14)


def resample_positions(
    source: str,
    positions: Float[Tensor, ...],
    shape: tuple[int, ...],
    num_prefix: int,
    grid: int,
    how: Resampling,
) -> Float[Tensor, "*one new_positions dim"]:
    """Position embeddings for a grid of `grid` x `grid` patches; those of CLS and registers stay as they are.

    Raises:
        WeightsError: What lies behind the prefix is no square of patches, or has another width than `shape`.
    """
    num_patches = positions.shape[-2] - num_prefix if positions.ndim > 1 else 0
    side = math.isqrt(max(num_patches, 0))
    one = positions.numel() == math.prod(positions.shape[-2:])
    if side == 0 or not one or side**2 != num_patches or positions.shape[-1] != shape[-1]:
        raise WeightsError(
            f"weights: '{source}' has position embeddings of shape {list(positions.shape)}: less {num_prefix} "
            f"for CLS and registers that isn't a square of patches of width {shape[-1]}; the model has {list(shape)}"
        )
    first = how.by_way_of or side
    if side == first == grid:
        return positions.reshape(shape)
    prefix, patches = positions.reshape(1, -1, shape[-1]).float().split([num_prefix, num_patches], dim=1)
    square = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if side != first:
        square = F.interpolate(square, size=(first, first), mode="bilinear", antialias=False)
    if grid != first:
        log.info("%s: position embeddings resampled from %dx%d to %dx%d patches", source, side, side, grid, grid)
        square = _resized(square, grid, how)
    patches = square.permute(0, 2, 3, 1).reshape(1, grid**2, -1)
    return cat([prefix, patches], dim=1).to(positions.dtype).reshape(shape)


def _resized(square: Float[Tensor, "1 dim side side"], grid: int, how: Resampling) -> Float[Tensor, "1 dim new new"]:
    if not how.offset:
        return F.interpolate(square, size=(grid, grid), mode=how.mode, antialias=how.antialias)
    scale = (grid + how.offset) / square.shape[-1]
    return F.interpolate(square, scale_factor=(scale, scale), mode=how.mode, antialias=how.antialias)
