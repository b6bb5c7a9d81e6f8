"""Writes a model folder: `config.json` beside safetensors shards with an index, as transformers lays them out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from composer_path.storage.atomic import write_whole
from composer_path.weights.tensor_file import INDEX, write_tensors


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    max_shard_size: str = "5GB",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write weights (tied ones once) and configuration; weight files of an earlier write are removed.

    `config.json` comes last, so that a folder that has one is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    for old in [path for path in folder.iterdir() if is_weights_file(path.name) and not path.is_dir()]:
        old.unlink()
    split = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for name, keys in split.filename_to_tensors.items():
        write_tensors(folder / name, {key: tensors[key] for key in keys}, metadata)
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    write_json(folder / "config.json", config)


def is_weights_file(name: str) -> bool:
    """Whether `write_folder` gives a file of weights, or their index, this name."""
    return name == INDEX or re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", name) is not None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file so that it is either the old one or complete."""
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))
