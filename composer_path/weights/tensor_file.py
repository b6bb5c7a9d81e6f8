"""A file of tensors: safetensors, or a torch pickle read without running what is in it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

PICKLES = (".bin", ".pth", ".pt", ".ckpt")
# Under which training programs put the weights in their checkpoints.
WRAPPERS = ("state_dict", "model", "model_state_dict")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")


class WeightsError(ValueError):
    """A file whose weights can't be read or don't fit; the message lists everything that is wrong."""


def read_tensor_file(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a `.safetensors` file or a torch pickle (`.bin`, `.pth`, `.pt`, `.ckpt`).

    Pickles are read with `weights_only=True`: one that holds anything but tensors and plain containers is refused. A
    pickle that holds its weights under `state_dict` or `model` is unwrapped.

    Raises:
        WeightsError: No such file, another kind of file, or a pickle with other things than tensors in it.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"weights: no file '{path}'")
    if path.suffix not in (".safetensors", *PICKLES):
        raise WeightsError(f"weights: '{path}' must end with .safetensors or one of {', '.join(PICKLES)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise WeightsError(f"weights: '{path}' can't be read, it may be cut or damaged: {error}") from error
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"weights: '{path}' isn't a plain pickle of tensors; pickles that hold objects could run code and "
            "are refused. Save the tensors alone, as safetensors"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise WeightsError(f"weights: '{path}' must hold a dict of tensors by name, found a {type(content).__name__}")
    others = sorted(str(key) for key, value in content.items() if not isinstance(value, Tensor))
    if others:
        raise WeightsError(f"weights: '{path}' must hold tensors only, found other things under {_some(others)}")
    return dict(content)


def read_metadata(path: str | Path) -> dict[str, str]:
    """What stands beside the tensors in a safetensors file; empty where nothing does.

    Raises:
        WeightsError: No such file, or a damaged one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"weights: '{path}' can't be read: {error}") from error


def read_tensor_folder(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder: safetensors or `pytorch_model.bin`, sharded or not.

    Raises:
        WeightsError: No weights there, an index that can't be followed, a tensor in two shards, or a damaged shard.
    """
    folder = Path(folder)
    names = [name for name in SINGLES if (folder / name).is_file()][:1]
    # Safetensors, sharded or not, come before pickles.
    for index in INDEXES if names != SINGLES[:1] else ():
        if (folder / index).is_file():
            names = _shards_of(folder / index)
            break
    if not names:
        raise WeightsError(f"weights: '{folder}' holds none of {', '.join(SINGLES + INDEXES)}")
    tensors: dict[str, Tensor] = {}
    for name in names:
        shard = read_tensor_file(folder / name)
        if twice := sorted(tensors.keys() & shard.keys()):
            raise WeightsError(f"weights: '{folder / name}' holds tensors that another shard holds too: {_some(twice)}")
        tensors |= shard
    return tensors


def _shards_of(index: Path) -> list[str]:
    """The files that an index names."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"weights: '{index}' is no index of shards ({type(error).__name__})") from None
    if outside:
        raise WeightsError(f"weights: '{index}' names files outside of the folder: {_some(outside)}")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise WeightsError(f"weights: '{index}' names files that aren't there: {_some(missing)}; copy the whole folder")
    return names


def check_tensors(
    source: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], may_be_missing: Iterable[str] = ()
) -> None:
    """Names and shapes must be the same.

    Args:
        source: What was read, for the message.
        expected: The module's tensors, by the module's names.
        found: The file's tensors, by the module's names.
        may_be_missing: Names that the file needn't have.

    Raises:
        WeightsError: Lists what is missing, what is left over, and each shape that differs, with both shapes.
    """
    missing = sorted(set(expected) - set(found) - set(may_be_missing))
    left_over = sorted(set(found) - set(expected))
    shapes = [
        f"{key}: the file has {list(found[key].shape)}, the model {list(expected[key].shape)}"
        for key in sorted(set(expected) & set(found))
        if found[key].shape != expected[key].shape
    ]
    problems = [
        f"{title} ({len(keys)}): {_some(keys)}"
        for title, keys in (("missing", missing), ("left over", left_over), ("other shapes", shapes))
        if keys
    ]
    if problems:
        raise WeightsError(f"weights: '{source}' doesn't fit the model. " + ". ".join(problems))


def _some(names: list[str], limit: int = 40) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
