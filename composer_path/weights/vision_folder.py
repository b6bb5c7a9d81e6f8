"""A folder of vision weights as transformers, open_clip and timm publish them, and what its JSON files say.

Heads, activation and epsilon change no tensor's shape: weights that fit may still be another model's. So what a folder
says of them is compared with the encoder that was built.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from composer_path.models.open_clip_trunk import OpenClipTrunk
from composer_path.models.vision_encoder import VisionEncoder, check_vision_keywords
from composer_path.models.vision_facts import ACTIVATIONS, VisionFacts, facts_of_open_clip, facts_of_timm
from composer_path.weights.tensor_file import WEIGHTS, WeightsError, read_tensor_file, read_tensor_folder

log = logging.getLogger(__name__)

CONFIG, PREPROCESSOR, OPEN_CLIP_CONFIG = "config.json", "preprocessor_config.json", "open_clip_config.json"
# What open_clip calls its weights in a folder; CONCH 1.5's vision tower; Hugging Face's names stand in WEIGHTS.
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
FURTHER_WEIGHTS = ("pytorch_model_vision.bin",)
LARGEST_JSON = 10**7  # bytes; a configuration has some hundred


@dataclass
class VisionFolder:
    """What a folder holds: tensors, what it says of the architecture and where, and its normalisation."""

    tensors: dict[str, torch.Tensor]
    facts: VisionFacts | None = None
    said_in: str = ""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    normalization_in: str = field(default="")


def read_vision_folder(folder: Path) -> VisionFolder:
    """Tensors and configuration of a folder. Names inside its files may only be those of files in it.

    Raises:
        WeightsError: No weights, or a JSON file that can't be read or doesn't say what it must.
    """
    own = next((name for name in OPEN_CLIP_WEIGHTS if (folder / name).is_file()), None)
    if (folder / OPEN_CLIP_CONFIG).is_file() and (own or not (folder / CONFIG).is_file()):
        found = VisionFolder(_tensors(folder, own))
        _read_open_clip_config(folder / OPEN_CLIP_CONFIG, found)
        return found
    found = VisionFolder(_tensors(folder, own))
    if (folder / CONFIG).is_file():
        _read_config(folder / CONFIG, found)
    if (folder / PREPROCESSOR).is_file():
        content = read_json_object(folder / PREPROCESSOR)
        mean, std = content.get("image_mean"), content.get("image_std")
        mean, std = ([0.0] * 3, [1.0] * 3) if content.get("do_normalize") is False else (mean, std)
        _take_normalization(folder / PREPROCESSOR, mean, std, found, white_of(folder / PREPROCESSOR, content))
    return found


def check_what_a_folder_says(folder: VisionFolder, encoder: VisionEncoder, *, normalization_given: bool) -> None:
    """Compare what a folder says with the encoder that is to hold its weights.

    Raises:
        WeightsError: Another architecture (every difference, with what to write); another mean or std, unless the user
            gave his own, of which he is warned.
    """
    by_name, facts = isinstance(encoder.trunk, OpenClipTrunk), encoder.facts()
    if folder.facts is not None and (differences := list(folder.facts.differences(facts, by_name))):
        raise WeightsError(
            f"weights: '{folder.said_in}' says another architecture than '{encoder.config['name']}' has: "
            + "; ".join(differences)
        )
    if folder.mean is None or folder.std is None:
        return
    ours = {"mean": encoder.mean, "std": encoder.std}
    theirs = {"mean": folder.mean, "std": folder.std}
    if all(_close(ours[key], theirs[key]) for key in ours):
        return
    words = ", ".join(f"{key} {list(theirs[key])} (here {list(ours[key])})" for key in ours)
    if normalization_given:
        log.warning("%s says %s; the YAML's are used", folder.normalization_in, words)
        return
    raise WeightsError(
        f"weights: '{folder.normalization_in}' says {words}; give vision_encoder.mean and vision_encoder.std, its own "
        "or yours"
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file with one object; keys given twice, NaN and infinity are refused, too.

    Raises:
        WeightsError: It can't be read.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it is larger than {LARGEST_JSON} bytes")
        content = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError:
        raise WeightsError(f"weights: '{path}': must be a JSON object; found one nested too deeply") from None
    except (ValueError, OSError) as error:  # undecodable bytes and JSON's own errors are ValueErrors
        why = " ".join(str(error).split())
        raise WeightsError(f"weights: '{path}': must be a JSON object; {why}; copy the folder again") from None
    if not isinstance(content, dict):
        raise WeightsError(f"weights: '{path}': must be a JSON object; found a {type(content).__name__}")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"found the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return found


def _no_number(word: str) -> None:
    raise ValueError(f"found {word}, which is no number")


def _tensors(folder: Path, own: str | None) -> dict[str, torch.Tensor]:
    if own is not None and not any((folder / name).is_file() for name in WEIGHTS):
        return read_tensor_file(folder / own)
    if own is not None and (folder / OPEN_CLIP_CONFIG).is_file():
        return read_tensor_file(folder / own)
    further = next((name for name in FURTHER_WEIGHTS if (folder / name).is_file()), None)
    if further is not None and not any((folder / name).is_file() for name in WEIGHTS):
        return read_tensor_file(folder / further)
    return read_tensor_folder(folder)


def _read_config(path: Path, found: VisionFolder) -> None:
    """`config.json`: transformers' has a `model_type`, timm's an `architecture`."""
    content = read_json_object(path)
    if "model_type" in content:
        said = content.get("vision_config", content)
        if not isinstance(said, dict):
            raise WeightsError(f"weights: '{path}': vision_config: must be an object; found a {type(said).__name__}")
        model_type = str(said.get("model_type", content["model_type"]))
        found.facts, found.said_in = _facts_of_transformers(path, model_type, said), str(path)
    elif "architecture" in content:
        arguments = _object(path, content, "model_args")
        with _named(path, "architecture and model_args"), torch.device("meta"):
            _check_sizes(arguments)
            arguments = {key: value for key, value in arguments.items() if key not in ("num_classes", "global_pool")}
            check_vision_keywords({key: value for key, value in arguments.items() if key != "img_size"})
            found.facts = facts_of_timm(content["architecture"], arguments)
        found.said_in = str(path)
        data = _object(path, content, "pretrained_cfg")
        _take_normalization(path, data.get("mean"), data.get("std"), found)


def _read_open_clip_config(path: Path, found: VisionFolder) -> None:
    content = read_json_object(path)
    model = _object(path, content, "model_cfg")
    vision = _object(path, model, "vision_cfg")
    if not vision:
        raise WeightsError(f"weights: '{path}': model_cfg.vision_cfg: must say the vision tower; found none")
    with _named(path, "model_cfg.vision_cfg"), torch.device("meta"):
        _check_sizes(vision)
        found.facts = facts_of_open_clip(vision, model.get("quick_gelu") is True)
    found.said_in = str(path)
    data = _object(path, content, "preprocess_cfg")
    _take_normalization(path, data.get("mean"), data.get("std"), found)


def _check_sizes(settings: Mapping[str, Any]) -> None:
    """Refuse more blocks or wider ones than a ViT has: building it is not to take for ever."""
    for key, value in settings.items():
        most = 1000 if key in ("depth", "layers") else 10**5
        if type(value) in (int, float) and value > most:
            raise ValueError(f"{key} must be {most} at most, found {value!r:.80}")


class _named:
    """Whatever a library says of a folder's settings, as one line that names the file."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            why = " ".join(str(error).split())[:300]
            raise WeightsError(
                f"weights: '{self.path}': {self.key}: no ViT can be built of it; {type(error).__name__}: {why}"
            ) from None


def _object(path: Path, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key, {})
    if not isinstance(value, dict):
        raise WeightsError(f"weights: '{path}': {key}: must be an object; found a {type(value).__name__}")
    return value


def white_of(path: Path, content: Mapping[str, Any]) -> float:
    """What a white pixel is before mean and std, by a preprocessor's configuration: 1 where it says nothing else."""
    factor = content.get("rescale_factor", 1 / 255) if content.get("do_rescale") is not False else 1
    if type(factor) not in (int, float) or not 0 < factor <= 1:
        raise WeightsError(f"weights: '{path}': rescale_factor: must be a number from 0 to 1; found {factor!r:.80}")
    return 255.0 * factor if abs(255 * factor - 1) > 1e-3 else 1.0


def _take_normalization(path: Path, mean: Any, std: Any, found: VisionFolder, white: float = 1) -> None:
    """Mean and std of a file that says them, for a white of 1; one alone, or no three numbers, is an error."""
    if mean is None and std is None:
        return
    for key, values in (("mean", mean), ("std", std)):
        numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
        if not numbers or len(values) != 3 or (key == "std" and min(values) <= 0):
            raise WeightsError(f"weights: '{path}': {key}: must be three numbers, of std above 0; found {values!r:.80}")
    found.mean, found.std = tuple(value / white for value in mean), tuple(value / white for value in std)
    found.normalization_in = str(path)


def _close(ours: tuple[float, ...], theirs: tuple[float, ...]) -> bool:
    return all(abs(a - b) < 1e-3 for a, b in zip(ours, theirs, strict=True))  # cards round to three digits


# What transformers calls a fact in the configuration of each of its ViTs; the rest has the names of FIELDS.
FIELDS = {
    "patch_size": "patch_size",
    "dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "activation": "hidden_act",
    "norm_eps": "layer_norm_eps",
    "num_registers": "num_register_tokens",
    "rope_base": "rope_theta",
}


def _facts_of_transformers(path: Path, model_type: str, said: dict[str, Any]) -> VisionFacts:
    """Facts of a configuration; what it doesn't say is transformers' default, where this version knows the type."""
    from transformers import CONFIG_MAPPING

    if model_type in ("clip", "siglip", "siglip2") and "vision_config" not in said:
        model_type += "_vision_model"
    defaults: dict[str, Any] = {}
    if model_type in CONFIG_MAPPING:
        defaults = CONFIG_MAPPING[model_type]().to_dict()
    elif not any(key in said for key in FIELDS.values()):
        raise WeightsError(
            f"weights: '{path}': model_type: must be a ViT that is read; found '{model_type}', which transformers "
            f"{transformers.__version__} doesn't know"
        )
    values = {name: said.get(key, defaults.get(key)) for name, key in FIELDS.items()}
    for name, value in values.items():
        wanted: tuple[type, ...] = (str,) if name == "activation" else (int, float)
        if value is not None and (type(value) not in wanted or (type(value) is not str and value <= 0)):
            if name == "num_registers" and value == 0:
                continue
            raise WeightsError(
                f"weights: '{path}': {FIELDS[name]}: must be a {wanted[0].__name__}; found {value!r:.80}"
            )
    activation = values["activation"]
    if activation is not None and activation not in ACTIVATIONS:
        raise WeightsError(
            f"weights: '{path}': hidden_act: must be one of {', '.join(sorted(ACTIVATIONS))}; found '{activation:.80}'"
        )
    if activation is not None:
        values["activation"] = ACTIVATIONS[activation]
    if said.get("use_swiglu_ffn", defaults.get("use_swiglu_ffn")) is True:
        values["activation"] = "silu"  # of Dinov2's gated MLP, whatever hidden_act says
    if model_type == "dinov2" and "num_register_tokens" not in said:
        values["num_registers"] = None
    return VisionFacts(**values)
