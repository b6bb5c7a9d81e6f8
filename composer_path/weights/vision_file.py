"""Vision weights files: timm's or open_clip's ViT names, with or without a prefix, at this or another image size."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from composer_path.models.open_clip_trunk import OpenClipTrunk
from composer_path.models.trunk import VisionTrunk
from composer_path.models.vision_encoder import VisionEncoder, untrained_vision_encoder
from composer_path.weights.tensor_file import WeightsError, check_tensors, read_tensor_file

log = logging.getLogger(__name__)


class VisionKeys(NamedTuple):
    """How one library names the parts of its ViT."""

    anchor: str  # a key that every file has; what stands before it in the file is the prefix of all keys
    positions: str  # the position embeddings
    behind: tuple[
        str, ...
    ]  # beginnings of keys behind the tokens (classifier, pooling): a file may have them, we don't


TIMM = VisionKeys("patch_embed.proj.weight", "pos_embed", ("head.", "head_dist.", "fc_norm.", "attn_pool."))
OPEN_CLIP = VisionKeys(
    "conv1.weight", "positional_embedding", ("proj", "ln_post.", "attn_pool.", "attn_pool_contrastive.")
)


def build_vision_encoder(name: str, *, weights: str | None = None, **architecture: Any) -> VisionEncoder:
    """A vision encoder by name, with random weights or those of a file.

    Args:
        name: See `untrained_vision_encoder`.
        weights: A file, see `load_vision_weights`.
        **architecture: Further keywords of `untrained_vision_encoder`.

    Raises:
        ValueError: Unknown names or keywords, sizes or weights that don't fit.
    """
    encoder = untrained_vision_encoder(name, **architecture)
    if weights is not None:
        load_vision_weights(weights, encoder)
    return encoder


def load_vision_weights(path: str | Path, encoder: VisionEncoder) -> None:
    """Load the weights of a `.safetensors` file or a torch pickle into a vision encoder, cast to its dtype.

    The prefix (`vision_tower.` in the reference's file, `visual.trunk.` in CONCH's, `module.`, none, ...) is found and
    removed. Position embeddings of another image size are resampled (bicubic, antialiased). Classifier and pooling
    weights are left out, and so are the text tower and all else in a whole vision-language checkpoint (prefix with
    `visual`); in any other file keys outside of the prefix are an error.
    Of a trunk of one's own the keys are those of its file.

    Raises:
        WeightsError: The file can't be read, no or several ViTs are in it, or keys and shapes differ (all listed).
    """
    trunk = encoder.trunk
    if isinstance(trunk, VisionTrunk):
        tensors = read_tensor_file(path)
        check_tensors(str(path), trunk.state_dict(), tensors)
        trunk.load_state_dict(tensors)
        return
    module, keys = (trunk.tower, OPEN_CLIP) if isinstance(trunk, OpenClipTrunk) else (trunk, TIMM)
    expected = module.state_dict()
    tensors = _behind_prefix(str(path), read_tensor_file(path), keys)
    tensors = {key: value for key, value in tensors.items() if key in expected or not key.startswith(keys.behind)}
    if keys.positions in tensors and keys.positions in expected:
        num_prefix = 0 if getattr(trunk, "no_embed_class", False) else trunk.num_prefix_tokens
        found, shape = tensors[keys.positions], expected[keys.positions].shape
        grid = encoder.image_size // encoder.patch_size
        tensors[keys.positions] = _resample(str(path), found, shape, num_prefix, grid)
    check_tensors(str(path), expected, tensors)
    module.load_state_dict(tensors)


def weights_hash(encoder: VisionEncoder, weights: Mapping[str, Tensor] | None = None) -> str:
    """A hash of an encoder's weights, as they are in bf16: in which dtype they are held doesn't matter.

    `weights`, by the encoder's names, are hashed in place of those that it holds.
    """
    state = hashlib.sha256()
    for name, parameter in sorted(encoder.named_parameters()):
        tensor = parameter if weights is None else weights[name]
        values = tensor.detach().to(device="cpu", dtype=torch.bfloat16).contiguous()
        state.update(f"{name} {list(values.shape)}".encode())
        state.update(values.reshape(-1).view(torch.int16).numpy().data)  # hashed where it lies, not copied
    return state.hexdigest()[:16]


def _behind_prefix(source: str, tensors: dict[str, Tensor], keys: VisionKeys) -> dict[str, Tensor]:
    """The ViT's tensors with their prefix removed."""
    prefixes = sorted(key.removesuffix(keys.anchor) for key in tensors if f".{key}".endswith(f".{keys.anchor}"))
    if not prefixes:
        raise WeightsError(
            f"weights: '{source}' has no key that ends with '{keys.anchor}', so it holds no ViT of this kind; "
            f"it begins with {sorted(tensors)[:5]}"
        )
    if len(prefixes) > 1:
        raise WeightsError(f"weights: '{source}' holds several ViTs, under {prefixes}; save the one to use alone")
    prefix = prefixes[0]
    inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    outside = sorted(key for key in tensors if not key.startswith(prefix))
    if outside and "visual" not in prefix.split("."):
        raise WeightsError(f"weights: '{source}' doesn't fit. Left over outside of '{prefix}': {outside[:40]}")
    if outside:
        log.info("%s: %d tensors of other parts than '%s' were left out", source, len(outside), prefix)
    return inside


def _resample(
    source: str, positions: Float[Tensor, "*one positions dim"], shape: tuple[int, ...], num_prefix: int, grid: int
) -> Float[Tensor, "*one new_positions dim"]:
    """Position embeddings for a grid of `grid` x `grid` patches; those of CLS and registers stay as they are."""
    if tuple(positions.shape) == tuple(shape):
        return positions
    num_patches = positions.shape[-2] - num_prefix
    side = math.isqrt(max(num_patches, 0))
    if side == 0 or side**2 != num_patches or positions.shape[-1] != shape[-1]:
        raise WeightsError(
            f"weights: '{source}' has position embeddings of shape {list(positions.shape)}: less {num_prefix} "
            f"for CLS and registers that isn't a square of patches of width {shape[-1]}; the model has {list(shape)}"
        )
    log.info("%s: position embeddings resampled from %dx%d to %dx%d patches", source, side, side, grid, grid)
    sizes = {"new_size": [grid, grid], "old_size": [side, side], "num_prefix_tokens": num_prefix}
    return resample_abs_pos_embed(positions.reshape(1, *positions.shape[-2:]), **sizes).reshape(shape)
