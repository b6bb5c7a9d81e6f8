"""Projector files: our `projector.safetensors`, the reference's `mm_projector.bin`, and CoCa pooler weights."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from composer_path.models.projector import Projector, untrained_projector
from composer_path.storage.atomic import write_whole
from composer_path.weights.tensor_file import WeightsError, check_tensors, read_metadata, read_tensor_file

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
        name = theirs + key.removeprefix(ours)
        if single and ours == "mlp.":
            name = name.replace("0.", "", 1)
        tensors[prefix + name] = tensor
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
        if ours == "mlp." and rest in ("weight", "bias"):  # a bare nn.Linear
            rest = "0." + rest
        renamed[ours + rest] = tensor
    return renamed


def save_projector(path: str | Path, projector: Projector, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write `projector.safetensors`: the tensors under our names, the config in the metadata.

    Args:
        path: The file.
        projector: Gives the config, and the tensors where `state_dict` is None.
        state_dict: The gathered tensors of a sharded projector, by the projector's own names.
    """
    tensors = _plain_tensors(projector.state_dict() if state_dict is None else state_dict)
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(projector.config, sort_keys=True)}
    write_whole(Path(path), lambda file: save_file(tensors, file.name, metadata=metadata))


def save_mm_projector(path: str | Path, projector: Projector, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write the reference's `mm_projector.bin`: a torch pickle of the tensors under its names.

    Arguments as `save_projector`.
    """
    tensors = _plain_tensors(projector.state_dict() if state_dict is None else state_dict)
    write_whole(Path(path), lambda file: torch.save(to_reference_projector(tensors), file))


def read_projector_config(path: str | Path) -> dict[str, Any] | None:
    """The config in a `projector.safetensors`, or None in a file that has none."""
    path = find_projector_file(path)
    if path.suffix != ".safetensors":
        return None
    metadata = read_metadata(path)
    return json.loads(metadata[CONFIG_KEY]) if CONFIG_KEY in metadata else None


def load_projector_weights(path: str | Path, projector: Projector) -> list[str]:
    """Load a projector's weights from any of the three kinds of file.

    CoCa start weights hold the pooler and its LayerNorm only: the MLP then keeps its random weights, which is logged.

    Args:
        path: The file, or a folder with `projector.safetensors` or `mm_projector.bin` in it.
        projector: Changed in place; the file's numbers are cast to its dtype.

    Returns:
        Names of the tensors that the file doesn't have and that stay as they were.

    Raises:
        WeightsError: The file is of another projector (all differences listed), or can't be read.
    """
    file = find_projector_file(path)
    config = read_projector_config(file)
    if config is not None and config != projector.config:
        differences = [
            f"{key}: the file has {config.get(key)}, the model {value}"
            for key, value in projector.config.items()
            if config.get(key) != value
        ]
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
    """The file itself, or the projector file in a folder.

    Raises:
        WeightsError: Neither.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for name in (SAFETENSORS, REFERENCE_BIN):
        if (path / name).is_file():
            return path / name
    raise WeightsError(f"weights: the folder '{path}' holds neither {SAFETENSORS} nor {REFERENCE_BIN}")


def _without_prefix(source: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a foreign file under the reference's names after `mm_projector.`."""
    embeddings = [key for key in tensors if re.search(r"(^|\.)embed_tokens\.weight$", key)]
    if embeddings:
        # Left by mm_use_im_start_end. Our prompts have no such marks, so the rows of the two extra words have no use.
        log.warning(
            "%s was trained with mm_use_im_start_end: %s is left out, the projector alone is used",
            source,
            embeddings[0],
        )
        tensors = {key: value for key, value in tensors.items() if key not in embeddings}
    prefixes = {key[: key.index(MARKER) + len(MARKER)] for key in tensors if MARKER in key}
    if len(prefixes) > 1:
        raise WeightsError(f"weights: '{source}' holds several projectors, under {sorted(prefixes)}")
    if prefixes:
        prefix = prefixes.pop()
        outside = [key for key in tensors if not key.startswith(prefix)]
        if outside:
            raise WeightsError(
                f"weights: '{source}' doesn't fit. Left over outside of '{prefix}': {sorted(outside)[:40]}"
            )
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
    renamed = {}
    outside = []
    for key, tensor in tensors.items():
        pair = next((pair for pair in names if key.startswith(pair[0])), None)
        if pair is None:
            outside.append(key)
        else:
            renamed[pair[1] + key.removeprefix(pair[0])] = tensor
    if outside and "visual" not in prefix.split("."):
        raise WeightsError(f"weights: '{source}' doesn't fit. Left over beside the pooler: {sorted(outside)[:40]}")
    return renamed


def _plain_tensors(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu().contiguous() for key, tensor in state_dict.items()}
