"""Projector files: our `projector.safetensors`, the reference's `mm_projector.bin`, and CoCa pooler weights."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from composer_path.models.projector import Projector, untrained_projector
from composer_path.storage.atomic import write_whole
from composer_path.weights.tensor_file import (
    WeightsError,
    check_tensors,
    read_metadata,
    read_tensor_file,
    write_tensors,
)

log = logging.getLogger(__name__)

SAFETENSORS = "projector.safetensors"
REFERENCE_BIN = "mm_projector.bin"
CONFIG_KEY = "composer_path.projector"  # in the safetensors metadata: the config as JSON
MARKER = "mm_projector."
# Beginnings of keys: ours, the reference's. Without a pooler the reference's projector is the MLP itself.
WITH_POOLER = (("pooler.", "attn_pool."), ("ln.", "ln."), ("mlp.", "proj."))
WITHOUT_POOLER = (("mlp.", ""),)
# How CoCa's own files call the pooler and the LayerNorm behind it: the reference's, CONCH's, open_clip's.
COCA_NAMES = (("attn_pool.", "ln."), ("attn_pool_caption.", "ln_caption."), ("attn_pool.", "ln_post."))


def build_projector(*, weights: str | None = None, **architecture: Any) -> Projector:
    """A projector with random weights or those of a file.

    Args:
        weights: `projector.safetensors`, the reference's `mm_projector.bin`, or CoCa start weights (pooler and `ln`).
        **architecture: Keywords of `composer_path.models.projector.untrained_projector`.

    Raises:
        ValueError: Unknown names, keys that contradict each other, sizes or weights that don't fit.
    """
    projector = untrained_projector(**architecture)
    if weights is not None:
        load_projector_weights(weights, projector)
    return projector


def to_reference_projector(state_dict: Mapping[str, Tensor], prefix: str = "model." + MARKER) -> dict[str, Tensor]:
    """A projector's tensors under the reference's names.

    A single linear layer is a bare `nn.Linear` there (`proj.weight`), a deeper MLP a sequence (`proj.0.weight`, ...).
    """
    table = WITH_POOLER if any(key.startswith("pooler.") for key in state_dict) else WITHOUT_POOLER
    single = not any(key.startswith("mlp.2.") for key in state_dict)
    tensors = {}
    for key, tensor in state_dict.items():
        ours, theirs = next(pair for pair in table if key.startswith(pair[0]))
        rest = key.removeprefix(ours + "0.") if single and ours == "mlp." else key.removeprefix(ours)
        tensors[prefix + theirs + rest] = tensor
    return tensors


def from_reference_projector(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A projector's tensors under our names, from the reference's without what stands before and in `mm_projector.`.

    Names that the reference doesn't have are kept as they are, and so are left over when keys are compared.
    """
    table = WITH_POOLER if any(key.startswith("attn_pool.") for key in tensors) else WITHOUT_POOLER
    renamed = {}
    for key, tensor in tensors.items():
        ours, theirs = next((pair for pair in table if key.startswith(pair[1])), ("", ""))
        rest = key.removeprefix(theirs)
        bare = ours == "mlp." and rest in ("weight", "bias")  # an nn.Linear of its own
        renamed[f"{ours}{'0.' if bare else ''}{rest}"] = tensor
    return renamed


def save_projector(path: str | Path, projector: Projector, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write `projector.safetensors`: the tensors under our names, the config in the metadata.

    `state_dict` holds the gathered tensors of a sharded projector, by the projector's own names.
    """
    tensors = projector.state_dict() if state_dict is None else state_dict
    write_tensors(Path(path), tensors, {CONFIG_KEY: json.dumps(projector.config, sort_keys=True)})


def save_mm_projector(path: str | Path, projector: Projector, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write the reference's `mm_projector.bin`: a torch pickle of the tensors under its names; see `save_projector`."""
    tensors = projector.state_dict() if state_dict is None else state_dict
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    write_whole(Path(path), lambda file: torch.save(to_reference_projector(plain), file))


def read_projector_config(path: str | Path) -> dict[str, Any] | None:
    """The config in a `projector.safetensors`, or None in a file that has none."""
    path = find_projector_file(path)
    metadata = read_metadata(path) if path.suffix == ".safetensors" else {}
    return json.loads(metadata[CONFIG_KEY]) if CONFIG_KEY in metadata else None


def load_projector_weights(path: str | Path, projector: Projector) -> list[str]:
    """Load a projector's weights from any of the three kinds of file, or from a folder with one; cast to its dtype.

    CoCa start weights hold the pooler and its LayerNorm only: the MLP then keeps its random weights, which is logged.

    Returns:
        Names of the tensors that the file doesn't have and that stay as they were.

    Raises:
        WeightsError: The file is of another projector (all differences listed), or can't be read.
    """
    file = find_projector_file(path)
    config = read_projector_config(file)
    if config is not None and config != projector.config:
        ours = projector.config
        changed = [key for key in ours if config.get(key) != ours[key]]
        differences = [f"{key}: the file has {config.get(key)}, the model {ours[key]}" for key in changed]
        raise WeightsError(f"weights: '{file}' is of another projector. " + "; ".join(differences))
    tensors = read_tensor_file(file)
    if config is None:
        tensors = from_reference_projector(_without_prefix(str(file), tensors))
    expected = projector.state_dict()
    mlp = [key for key in expected if key.startswith("mlp.")]
    is_start = projector.pooler is not None and not any(key.startswith("mlp.") for key in tensors)
    check_tensors(str(file), expected, tensors, may_be_missing=mlp if is_start else ())
    projector.load_state_dict(tensors, strict=False)
    missing = [key for key in expected if key not in tensors]
    if missing:
        log.warning("%s holds the pooler only: the projector's MLP starts from random weights", file)
    return missing


def find_projector_file(path: str | Path) -> Path:
    """The file itself, or the projector file in a folder."""
    if not Path(path).is_dir():
        return Path(path)
    for name in (SAFETENSORS, REFERENCE_BIN):
        if (file := Path(path) / name).is_file():
            return file
    raise WeightsError(f"weights: the folder '{path}' holds neither {SAFETENSORS} nor {REFERENCE_BIN}")


def _without_prefix(source: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a foreign file under the reference's names after `mm_projector.`."""
    if embeddings := [key for key in tensors if re.search(r"(^|\.)embed_tokens\.weight$", key)]:
        # Left by mm_use_im_start_end. Our prompts have no such marks, so the rows of the two extra words have no use.
        left_out = f"{embeddings[0]} is left out, the projector alone is used"
        log.warning("%s was trained with mm_use_im_start_end: %s", source, left_out)
        tensors = {key: value for key, value in tensors.items() if key not in embeddings}
    prefixes = {key[: key.index(MARKER) + len(MARKER)] for key in tensors if MARKER in key}
    if len(prefixes) > 1:
        raise WeightsError(f"weights: '{source}' holds several projectors, under {sorted(prefixes)}")
    for prefix in prefixes:
        if outside := sorted(key for key in tensors if not key.startswith(prefix)):
            raise WeightsError(f"weights: '{source}' doesn't fit. Left over outside of '{prefix}': {outside[:40]}")
        return {key.removeprefix(prefix): value for key, value in tensors.items()}
    for pooler, ln in COCA_NAMES:
        for key in tensors:
            prefix = key.removesuffix(pooler + "query")
            if prefix != key and f"{prefix}{ln}weight" in tensors:
                return _coca_tensors(source, tensors, prefix, pooler, ln)
    return tensors


def _coca_tensors(source: str, tensors: dict[str, Tensor], prefix: str, pooler: str, ln: str) -> dict[str, Tensor]:
    """Pooler and LayerNorm of a CoCa file; of a whole model (prefix with `visual`) the rest is left out."""
    names = ((prefix + pooler, "attn_pool."), (prefix + ln, "ln."), (prefix + "proj.", "proj."))
    renamed = {
        new + key.removeprefix(old): tensor
        for key, tensor in tensors.items()
        for old, new in names
        if key.startswith(old)
    }
    outside = sorted(key for key in tensors if not key.startswith(tuple(old for old, _ in names)))
    if outside and "visual" not in prefix.split("."):
        raise WeightsError(f"weights: '{source}' doesn't fit. Left over beside the pooler: {outside[:40]}")
    return renamed
