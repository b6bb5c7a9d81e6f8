"""Vision weights: a file or folder of any layout that is known, at this or another image size, into an encoder."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from composer_path.models.lora import plain_weights
from composer_path.models.open_clip_trunk import OpenClipTrunk
from composer_path.models.trunk import VisionTrunk
from composer_path.models.vision_encoder import VisionEncoder, untrained_vision_encoder
from composer_path.weights.tensor_file import WeightsError, check_tensors, read_tensor_file, some
from composer_path.weights.vision_folder import check_what_a_folder_says, read_vision_folder
from composer_path.weights.vision_layout import Found, find_vit
from composer_path.weights.vision_names import from_open_clip, to_open_clip
from composer_path.weights.vision_positions import resample_positions
from composer_path.weights.whole_folder import whole_folder

log = logging.getLogger(__name__)

# Names of a gated MLP that the DINOv2 and DINOv3 repositories, EVA-02 and transformers have for SiLU only.
GATED = re.compile(r"\.mlp\.(w12|w1|weights_in|gate_proj)\.")


def build_vision_encoder(name: str, *, weights: str | None = None, **architecture: Any) -> VisionEncoder:
    """A vision encoder by name, with random weights or those of a file.

    Args:
        name: See `untrained_vision_encoder`.
        weights: A file or folder, see `load_vision_weights`.
        **architecture: Further keywords of `untrained_vision_encoder`.

    Raises:
        ValueError: Unknown names or keywords, sizes or weights that don't fit.
    """
    encoder = untrained_vision_encoder(name, **architecture)
    if weights is not None:
        given = architecture.get("mean") is not None and architecture.get("std") is not None
        load_vision_weights(weights, encoder, normalization_given=given)
    return encoder


def load_vision_weights(path: str | Path, encoder: VisionEncoder, *, normalization_given: bool = True) -> None:
    """Load the weights of a `.safetensors` file, a torch pickle or a folder into a vision encoder, cast to its dtype.

    Layouts that are read are those of `vision_layout.LAYOUTS`. The prefix (`vision_tower.` in the reference's file,
    `visual.trunk.` in CONCH's, `module.`, `teacher.backbone.`, none, ...) is found and removed. Position embeddings of
    another image size are resampled as the file's library does. Classifier, pooling and mask token are left out, and
    so are the text tower and all else in a whole vision-language checkpoint; what was left out is logged.
    Of a trunk of one's own the keys are those of its file.

    Args:
        path: A folder is read with its `config.json`, `preprocessor_config.json` or `open_clip_config.json`.
        encoder: Where they go.
        normalization_given: Whether the user gave mean and std, so that a folder's own only earn a warning.

    Raises:
        WeightsError: It can't be read, no or several ViTs are in it, keys and shapes differ (all listed), or a
            folder's configuration says another architecture or, where none is given, another normalisation.
    """
    whole = whole_folder(path) if Path(path).is_dir() else None
    if whole is not None and whole.kind == "composer_path":
        tensors = whole.tensors_of("vision_encoder")
        check_tensors(str(path), encoder.state_dict(), tensors)
        encoder.load_state_dict(tensors)
        return
    if whole is not None and whole.kind != "llava-hf":  # its configuration says nothing of the tower
        tensors, said = whole.tensors_of("vision_encoder"), True
    elif Path(path).is_dir():
        folder = read_vision_folder(Path(path))
        if gives_hidden_state(encoder) and folder.facts and (folder.facts.depth or 0) > len(encoder.blocks):
            folder.facts = replace(folder.facts, depth=None)  # the rest is left out
        check_what_a_folder_says(folder, encoder, normalization_given=normalization_given)
        tensors = folder.tensors
        said = folder.mean is not None
    else:
        tensors, said = read_tensor_file(path), False
    if not (said or normalization_given or encoder.normalization_known):
        log.warning(
            "%s: mean %s and std %s are only the library's default for '%s', and the file says none; pathology "
            "encoders have their own: give vision_encoder.mean and std",
            path,
            list(encoder.mean),
            list(encoder.std),
            encoder.config["name"],
        )
    trunk = encoder.trunk
    if isinstance(trunk, VisionTrunk):
        check_tensors(str(path), trunk.state_dict(), tensors)
        trunk.load_state_dict(tensors)
        return
    module = trunk.tower if isinstance(trunk, OpenClipTrunk) else trunk
    expected = module.state_dict()
    found = find_vit(str(path), tensors)
    tensors = fitted(str(path), found, encoder)
    check_tensors(str(path), expected, tensors)
    module.load_state_dict(tensors)


def fitted(source: str, found: Found, encoder: VisionEncoder) -> dict[str, Tensor]:
    """The tensors of a file by the names that the encoder's trunk has, positions at its size."""
    layout, trunk = found.layout, encoder.trunk
    into_open_clip = isinstance(trunk, OpenClipTrunk)
    expected = (trunk.tower if into_open_clip else trunk).state_dict()
    if into_open_clip:
        expected = from_open_clip(dict(expected))
    dropped = [key for key in found.tensors if re.match(layout.left_out, key)]
    renamed = layout.to_timm({key: value for key, value in found.tensors.items() if key not in dropped})
    if gives_hidden_state(encoder):
        depth = len(encoder.blocks)
        later = [key for key in renamed if key.startswith("norm.") or _block(key) >= depth]
        dropped += later
        renamed = {key: value for key, value in renamed.items() if key not in later}
    pooled = [
        key for key in renamed if key.startswith("norm.") and key not in expected and _norm_is_pooled(found, trunk)
    ]
    tensors = {key: value for key, value in renamed.items() if key not in pooled}
    if left_out := sorted([*dropped, *pooled, *found.beside]):
        log.info("%s (%s): %d tensors were left out: %s", source, layout.library, len(left_out), some(left_out, 8))
    has = encoder.facts().activation
    if has != "silu" and (gated := next((key for key in found.tensors if GATED.search(key)), None)):
        raise WeightsError(
            f"weights: '{source}' has a gated MLP of SiLU ('{gated}'), the model has {has}; give kwargs: "
            "{mlp_layer: SwiGLUPacked, act_layer: SiLU}, or another name"
        )
    _place_class_and_registers(tensors, found, trunk)
    _fill_biases(source, tensors, expected)
    key = "pos_embed"
    if key in tensors and key in expected:
        num_prefix = 0 if getattr(trunk, "no_embed_class", False) else trunk.num_prefix_tokens
        grid = encoder.image_size // encoder.patch_size
        shape = tuple(expected[key].shape)
        tensors[key] = resample_positions(source, tensors[key], shape, num_prefix, grid, layout.resampling)
    return to_open_clip(tensors) if into_open_clip else tensors


def gives_hidden_state(encoder: VisionEncoder) -> bool:
    """Whether an encoder is built to end at a hidden state, as LLaVA takes them: what lies behind it is left out."""
    return "layer" in encoder.config or encoder.config["kwargs"].get("final_norm") is False


def _block(key: str) -> int:
    """The number of the block that a tensor is in; -1 of what is in none."""
    found = re.match(r"blocks\.(\d+)\.", key)
    return int(found[1]) if found else -1


def _norm_is_pooled(found: Found, trunk: Any) -> bool:
    """Whether a final norm that the trunk lacks belongs to what is pooled behind the tokens.

    So it does in an open_clip tower that pools by attention, and in an EVA-02 as its pretraining left it (with a mask
    token), whose norm timm makes its `fc_norm`.
    """
    lacks = isinstance(getattr(trunk, "norm", None), torch.nn.Identity)
    return isinstance(trunk, OpenClipTrunk) or (lacks and "mask_token" in found.tensors)


def _place_class_and_registers(tensors: dict[str, Tensor], found: Found, trunk: Any) -> None:
    """Give CLS and registers the positions that timm's model has for them.

    Elsewhere the first position is that of CLS, and registers have none. timm's models with `no_embed_class` have the
    sum in the CLS token; its others want a position for each register, which is zero.
    """
    positions, class_token = tensors.get("pos_embed"), tensors.get("cls_token")
    if not found.layout.class_in_positions or positions is None or class_token is None:
        return
    dim, registers = trunk.embed_dim, tensors.get("reg_token", torch.zeros(1, 0, 1))
    if positions.ndim != 3 or registers.ndim != 3 or positions.shape[-1] != dim or class_token.numel() != dim:
        return  # which is reported with all other shapes
    if getattr(trunk, "no_embed_class", False):
        tensors["cls_token"] = class_token.reshape(1, 1, -1) + positions[:, :1]
        tensors["pos_embed"] = positions[:, 1:]
    elif registers.shape[1]:
        none = positions.new_zeros(len(positions), registers.shape[1], dim)
        tensors["pos_embed"] = torch.cat([positions[:, :1], none, positions[:, 1:]], dim=1)


def _fill_biases(source: str, tensors: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Zeros for the biases of EVA's and DINOv3's queries and values, where the file has none of them at all.

    The other way round, biases that are all zero fall away where the model has none: DINOv3's are, and timm has models
    with and without them.
    """
    for kind in (".attn.q_bias", ".attn.v_bias"):
        wanted = {key for key in expected if key.endswith(kind)}
        there = {key for key in tensors if key.endswith(kind)}
        if wanted and not there:
            log.warning("%s: has no '%s', which the model has; they are zero", source, kind[1:])
            tensors |= {key: torch.zeros(expected[key].shape) for key in wanted}
        elif there and not wanted and not any(tensors[key].any() for key in there):
            log.info("%s: all its '%s' are zero, and the model has none", source, kind[1:])
            for key in there:
                del tensors[key]


def weights_hash(encoder: VisionEncoder, weights: Mapping[str, Tensor] | None = None) -> str:
    """A hash of an encoder's weights, as they are in bf16: in which dtype they are held doesn't matter.

    `weights`, by the encoder's names, are hashed in place of those that it holds.
    """
    state = hashlib.sha256()
    for name, parameter in sorted(plain_weights(dict(encoder.named_parameters())).items()):
        tensor = parameter if weights is None else weights[name]
        values = tensor.detach().to(device="cpu", dtype=torch.bfloat16).contiguous()
        state.update(f"{name} {list(values.shape)}".encode())
        state.update(values.reshape(-1).view(torch.int16).numpy().data)  # hashed where it lies, not copied
    return state.hexdigest()[:16]
