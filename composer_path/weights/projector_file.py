"""Projector files: our `projector.safetensors`, the reference's `mm_projector.bin`; and files with CoCa's pooler."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from composer_path.models.projector import PooledMlp, Projector, untrained_projector
from composer_path.models.vision_encoder import VisionEncoder
from composer_path.storage.atomic import write_whole
from composer_path.weights.projector_names import MARKER, WORDS, from_reference_projector, to_reference_projector
from composer_path.weights.projector_origin import ProjectorOrigin
from composer_path.weights.tensor_file import (
    WeightsError,
    check_tensors,
    read_metadata,
    read_tensor_file,
    write_tensors,
)
from composer_path.weights.whole_folder import WholeFolder, whole_folder

log = logging.getLogger(__name__)

SAFETENSORS = "projector.safetensors"
REFERENCE_BIN = "mm_projector.bin"
CONFIG_KEY = "composer_path.projector"  # in the safetensors metadata: the config as JSON
ORIGIN_KEY = "composer_path.projector_origin"  # likewise: what it was trained with
POOLER_KEY = "model.projector.pooler_weights"
EITHER = "give the one (a whole projector) or the other (CoCa's pooler alone)"
# How CoCa's own files call the pooler and the LayerNorm behind it: the reference's, CONCH's, open_clip's.
COCA_NAMES = (("attn_pool.", "ln."), ("attn_pool_caption.", "ln_caption."), ("attn_pool.", "ln_post."))


def build_projector(
    *,
    weights: str | None = None,
    pooler_weights: str | None = None,
    vision_encoder: VisionEncoder | None = None,
    **architecture: Any,
) -> Projector:
    """A projector with random weights or those of a file.

    Args:
        weights: A whole projector: `projector.safetensors`, or the reference's `mm_projector.bin`.
        pooler_weights: Instead: CoCa's pooler and its LayerNorm to start from; the MLP starts random.
        vision_encoder: The one before it, which must be the one that the file's projector was trained with.
        **architecture: Keywords of `composer_path.models.projector.untrained_projector`.

    Raises:
        ValueError: Unknown names, keys that contradict each other, sizes or weights that don't fit.
    """
    if weights is not None and pooler_weights is not None:
        raise ValueError(f"model.projector: found weights and pooler_weights; {EITHER}")
    projector = untrained_projector(**architecture)
    if weights is not None:
        load_projector_weights(weights, projector, vision_encoder)
    if pooler_weights is not None:
        load_pooler_weights(pooler_weights, projector)
    return projector


def save_projector(
    path: str | Path,
    projector: Projector,
    state_dict: Mapping[str, Tensor] | None = None,
    origin: ProjectorOrigin | None = None,
) -> None:
    """Write `projector.safetensors`: the tensors under our names; the config and the origin in the metadata.

    `state_dict` holds the gathered tensors of a sharded projector, by the projector's own names.
    """
    tensors = projector.state_dict() if state_dict is None else state_dict
    metadata = {CONFIG_KEY: json.dumps(projector.config, sort_keys=True)}
    write_tensors(Path(path), tensors, metadata | ({} if origin is None else {ORIGIN_KEY: origin.to_json()}))


def save_mm_projector(path: str | Path, projector: Projector, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write the reference's `mm_projector.bin`: a torch pickle of the tensors under its names; see `save_projector`."""
    tensors = projector.state_dict() if state_dict is None else state_dict
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    write_whole(Path(path), lambda file: torch.save(to_reference_projector(plain), file))


def read_projector_config(path: str | Path) -> dict[str, Any] | None:
    """The config in a `projector.safetensors`, or None in a file that has none."""
    return _described(find_projector_file(path))[0]


def load_projector_weights(path: str | Path, projector: Projector, encoder: VisionEncoder | None = None) -> None:
    """Load a whole projector from a file of either kind, or from a folder with one; cast to its dtype.

    Of the reference's files, and of those of earlier versions, nobody can tell which encoder they belong to: they are
    loaded with a warning.

    Raises:
        WeightsError: The file is of another projector, or was trained with another encoder (all differences are listed,
            with both values), lacks a part, or can't be read.
    """
    if (whole := _whole(path)) is not None:
        _load_from_whole(whole, projector)
        return
    file = find_projector_file(path)
    config, origin = _described(file)
    _check_config(str(file), config, projector)
    if encoder is not None and origin is not None and (differences := origin.differences(projector, encoder)):
        fix = "take the encoder that it was trained with, or train a projector for this one"
        raise WeightsError(f"weights: '{file}' was trained with another encoder. {'; '.join(differences)}; {fix}")
    tensors = read_tensor_file(file)
    if config is None and not isinstance(projector, PooledMlp):
        fix = f"give a {SAFETENSORS} that a run with it wrote"
        raise WeightsError(f"weights: '{file}' doesn't say which projector it is of; {fix}")
    if config is None:
        tensors = _from_reference(str(file), tensors, projector.marks is not None)
    expected = projector.state_dict()
    parts, wanted = ({key.partition(".")[0] for key in state} for state in (tensors, expected))
    if config is None and "pooler" in parts and "mlp" in wanted - parts:
        raise WeightsError(f"weights: '{file}' holds a pooler without its MLP; give it as {POOLER_KEY}")
    check_tensors(str(file), expected, tensors)
    projector.load_state_dict(tensors)
    if encoder is not None and origin is None:
        log.warning("%s doesn't say which vision encoder it was trained with, so that can't be verified", file)


def _whole(path: str | Path) -> WholeFolder | None:
    """A whole model's folder that has no projector's file beside its weights."""
    files = [Path(path) / name for name in (SAFETENSORS, REFERENCE_BIN)]
    return None if not Path(path).is_dir() or any(file.is_file() for file in files) else whole_folder(path)


def _load_from_whole(whole: WholeFolder, projector: Projector) -> None:
    if whole.kind == "composer_path":
        said = whole.config.get("projector_config", whole.config.get("projector"))
        _check_config(str(whole.path), said if isinstance(said, dict) else None, projector)
    tensors = whole.projector()
    check_tensors(str(whole.path), projector.state_dict(), tensors)
    projector.load_state_dict(tensors)


def _check_config(source: str, config: Mapping[str, Any] | None, projector: Projector) -> None:
    """Refuse a file that says it is of another projector."""
    if config is not None and (unlike := _unlike(config, projector.config)):
        raise WeightsError(f"weights: '{source}' is of another projector. {'; '.join(unlike)}")


def load_pooler_weights(path: str | Path, projector: Projector) -> None:
    """Load the pooler and its LayerNorm from CoCa's file, also out of a whole model; the MLP keeps its random weights.

    Raises:
        WeightsError: The projector has no pooler, or the file is of another one, holds a whole projector, or can't be
            read.
    """
    beside = ("mlp.", "marks")
    expected = {key: value for key, value in projector.state_dict().items() if not key.startswith(beside)}
    if not expected:
        raise WeightsError(f"{POOLER_KEY}: this projector has no pooler; leave it out, or give a type with attn_pool")
    tensors = _from_reference(str(path), read_tensor_file(path), False)
    if any(key.startswith("mlp.") for key in tensors):
        raise WeightsError(f"{POOLER_KEY}: '{path}' holds an MLP too; give it as model.projector.weights")
    check_tensors(str(path), expected, tensors)
    projector.load_state_dict(tensors, strict=False)
    log.info("%s holds the pooler only: the projector's MLP starts from random weights", path)


def _described(file: Path) -> tuple[dict[str, Any] | None, ProjectorOrigin | None]:
    """A file's config and origin, None for what it doesn't say."""
    metadata = read_metadata(file) if file.suffix == ".safetensors" else {}
    config = origin = None
    try:
        if CONFIG_KEY in metadata:
            config = dict(json.loads(metadata[CONFIG_KEY]))
        if ORIGIN_KEY in metadata:
            origin = ProjectorOrigin.from_json(metadata[ORIGIN_KEY])
    except (ValueError, TypeError, RecursionError) as error:
        fix = "take a projector.safetensors that this version or an earlier one wrote"
        raise WeightsError(f"weights: what '{file}' says of its projector can't be read ({error}); {fix}") from None
    return config, origin


def _unlike(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    changed = [key for key in {**ours, **theirs} if theirs.get(key) != ours.get(key)]
    return [f"{key}: the file has {theirs.get(key)}, the model {ours.get(key)}" for key in changed]


def find_projector_file(path: str | Path) -> Path:
    """The file itself, or the projector file in a folder."""
    if not Path(path).is_dir():
        return Path(path)
    for name in (SAFETENSORS, REFERENCE_BIN):
        if (file := Path(path) / name).is_file():
            return file
    raise WeightsError(f"weights: the folder '{path}' holds neither {SAFETENSORS} nor {REFERENCE_BIN}")


def _from_reference(source: str, tensors: dict[str, Tensor], marked: bool) -> dict[str, Tensor]:
    """The tensors of a foreign file under our names; its marks around images where they are wanted."""
    words = [key for key in tensors if f".{key}".endswith(f".{WORDS}")]  # left by mm_use_im_start_end
    others = {key: value for key, value in tensors.items() if key not in words}
    found = _without_prefix(source, others)
    if words and not marked:
        fix = f"{words[0]} is left out; model.projector.image_marks: true takes the marks, too"
        log.warning("%s was trained with mm_use_im_start_end: %s", source, fix)
    elif words:
        found[WORDS] = tensors[words[0]]
    return from_reference_projector(found)


def _without_prefix(source: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a foreign file under the reference's names after `mm_projector.`."""
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
