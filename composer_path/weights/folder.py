"""A model folder on disk: `config.json` beside safetensors shards with an index, as transformers lays them out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def write_folder(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], max_shard_size: str = "5GB"
) -> None:
    """Write weights and configuration; `config.json` comes last, so that a folder that has one is complete.

    Args:
        folder: Made if needed. Weight files of an earlier write are removed, others are left alone.
        config: JSON-serialisable.
        tensors: Distinct tensors by key (tied ones once).
        max_shard_size: Of one file, such as "5GB".
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    for old in [*folder.glob("model*.safetensors"), folder / INDEX]:
        old.unlink(missing_ok=True)
    split = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for name, keys in split.filename_to_tensors.items():
        save_file({key: tensors[key].contiguous().cpu() for key in keys}, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX, index)
    write_json(folder / "config.json", config)


def read_folder(folder: Path, model_type: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a folder written by `write_folder`.

    Raises:
        ValueError: Not a folder of this `model_type`, or a file of its index is missing.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"no config.json in '{folder}'; it must be a folder written by an export or by save_pretrained"
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != model_type:
        raise ValueError(
            f"'{folder}/config.json' has model_type '{config.get('model_type')}', expected '{model_type}'; "
            "a folder in the reference's names is loaded by composer_path.weights.load_reference_model"
        )
    return config, read_tensors(folder)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors, sharded or not."""
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = [WEIGHTS]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"'{folder}': weight files are missing: {', '.join(missing)}")
    tensors: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"'{folder}/{INDEX}' names a file outside of its folder")
        try:
            tensors |= load_file(folder / name)
        except SafetensorError as error:
            raise ValueError(f"'{folder / name}' is damaged ({error}); export the model again") from None
    return tensors


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file so that it is either the old one or complete."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)
