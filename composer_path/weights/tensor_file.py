"""A file of tensors: safetensors, or a torch pickle read without unpickling it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from composer_path.storage.atomic import write_whole
from composer_path.storage.json_object import file_inside, read_json_object
from composer_path.weights.torch_file import TorchFileError, read_torch_file

PICKLES = (".bin", ".pth", ".pt", ".ckpt")
# Under which training programs put the weights in their checkpoints.
WRAPPERS = ("state_dict", "model", "model_state_dict", "teacher")
INDEX = "model.safetensors.index.json"
# What a folder's weights begin with; the first that is there is taken, so safetensors come before pickles.
WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin.index.json", "pytorch_model.bin")

FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
SAFE_FIX = "pickles that hold objects could run code and are refused: save the tensors alone, as safetensors"


class WeightsError(ValueError):
    """A file whose weights can't be read or don't fit; the message lists everything that is wrong."""


def everything(name: str) -> bool:
    """Whether a tensor is wanted: it is, whatever its name."""
    return True


def read_tensor_file(path: str | Path, wanted: Callable[[str], bool] = everything) -> dict[str, Tensor]:
    """The wanted tensors, by default all, of a `.safetensors` file or a torch pickle (`.bin`, `.pth`, `.pt`, `.ckpt`).

    Those of safetensors are the file's pages, read when they are looked at. A pickle that holds anything but tensors
    and plain containers is refused, and so is a tensor that is larger than what is stored of it. One that holds its
    weights under `state_dict` or `model` is unwrapped.

    Raises:
        WeightsError: No such file, another kind of file, or a pickle with other things than tensors in it.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"weights: no file '{path}'")
    if path.suffix not in (".safetensors", *PICKLES):
        raise WeightsError(f"weights: '{path}' must end with .safetensors or one of {', '.join(PICKLES)}")
    _require_content(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
        content = read_torch_file(path)
    except SafetensorError as error:
        raise WeightsError(f"weights: '{path}' can't be read, it may be cut or damaged: {error}") from error
    except TorchFileError as error:
        raise WeightsError(
            f"weights: '{path}': must be tensors in plain dicts and lists, whole, as torch.save writes them; found "
            f"{error}; {error.fix or SAFE_FIX}"
        ) from None
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise WeightsError(f"weights: '{path}' must hold a dict of tensors by name, found a {type(content).__name__}")
    if others := sorted(str(key) for key, value in content.items() if not isinstance(value, Tensor)):
        raise WeightsError(f"weights: '{path}' must hold tensors only, found other things under {some(others)}")
    return {name: value for name, value in content.items() if wanted(name)}


def shapes_of_file(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors by name; of safetensors no data are read."""
    if path.suffix != ".safetensors":
        return {name: tuple(value.shape) for name, value in read_tensor_file(path).items()}
    _require_content(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"weights: '{path}' can't be read, it may be cut or damaged: {error}") from None


def _require_content(path: Path) -> None:
    """Refuse what was left or saved in a file's place."""
    with open(path, "rb") as file:
        head = file.read(64).lstrip().lower()
    found = "an empty file" if not head else None
    if head.startswith(b"version https://git-lfs"):
        found = "a Git LFS pointer; run `git lfs pull`"
    elif head.startswith((b"<!doctype html", b"<html")):
        found = "an HTML page; fetch the file itself"
    if found is not None:
        raise WeightsError(f"weights: '{path}' must hold tensors, found {found}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        WeightsError: Weights that aren't finite, which nothing could be started from.
    """
    if broken := not_finite(tensors):
        raise WeightsError(
            f"weights: '{path}' isn't written: {len(broken)} tensors hold NaN or infinity: {some(broken)}; go on from "
            "an earlier checkpoint, with a lower learning rate"
        )
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    write_whole(path, lambda file: save_file(plain, file.name, metadata={"format": "pt", **(metadata or {})}))


def read_metadata(path: str | Path) -> dict[str, str]:
    """What stands beside the tensors in a safetensors file; empty where nothing does."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"weights: '{path}' can't be read: {error}") from error


def _first_of(folder: Path) -> str:
    """The file that a folder's weights begin with."""
    found = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise WeightsError(f"weights: '{folder}' holds none of {', '.join(WEIGHTS)}")
    if found == WEIGHTS[0] and (folder / INDEX).is_file():  # of which one may be older
        raise WeightsError(f"weights: '{folder}' holds two models, {found} and {INDEX}; remove one of them")
    try:
        file_inside(folder, found)
    except ValueError as error:
        raise WeightsError(f"weights: {error}") from None
    return found


def read_tensor_folder(folder: str | Path, wanted: Callable[[str], bool] = everything) -> dict[str, Tensor]:
    """The wanted tensors of a Hugging Face folder: safetensors or `pytorch_model.bin`, sharded or not."""
    tensors: dict[str, Tensor] = {}
    seen: set[str] = set()

    def note(name: str) -> bool:
        seen.add(name)
        return wanted(name)

    for file in files_of_folder(Path(folder)):
        before, shard = set(tensors), read_tensor_file(file, note)
        _refuse_twice(file, before, shard)
        tensors |= shard
    _check_index(Path(folder), seen)
    return tensors


def shapes_of_folder(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a Hugging Face folder's tensors by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files_of_folder(folder):
        shard = shapes_of_file(file)
        _refuse_twice(file, set(shapes), shard)
        shapes |= shard
    _check_index(folder, set(shapes))
    return shapes


def files_of_folder(folder: Path) -> list[Path]:
    """The files that hold a Hugging Face folder's weights."""
    found = _first_of(folder)
    return [folder / name for name in (_shards_of(folder / found) if found.endswith(".json") else [found])]


def _refuse_twice(file: Path, before: set[str], shard: Iterable[str]) -> None:
    if twice := sorted(before & set(shard)):
        raise WeightsError(f"weights: '{file}' holds tensors that another shard holds too: {some(twice)}")


def _check_index(folder: Path, names: set[str]) -> None:
    """Refuse an index that names what its shards don't hold."""
    found = _first_of(folder)
    if found.endswith(".json"):
        said: dict[str, str] = read_json_object(folder / found)["weight_map"]
        if wrong := sorted(f"{key} in {name}" for key, name in said.items() if key not in names):
            where = f"weights: '{folder / found}' names what isn't there"
            raise WeightsError(f"{where}: {some(wrong)}; copy the whole folder again")


def _shards_of(index: Path) -> list[str]:
    """The files that an index names."""
    try:
        shards = read_json_object(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"'{index}': must have a weight_map; found none; copy the whole folder again")
        for name in shards.values():
            file_inside(index.parent, name)
        names = sorted(set(shards.values()))
    except ValueError as error:
        raise WeightsError(f"weights: '{index}' is no index of shards: {error}") from None
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise WeightsError(f"weights: '{index}' names files that aren't there: {some(missing)}; copy the whole folder")
    return names


def check_tensors(
    source: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], may_be_missing: Iterable[str] = ()
) -> None:
    """Names and shapes of what was found in `source` must be the module's, both under the module's names, and finite.

    Raises:
        WeightsError: Lists what is missing, what is left over, each shape that differs, with both shapes, and what
            holds NaN or infinity.
    """
    differences = {
        "missing": sorted(set(expected) - set(found) - set(may_be_missing)),
        "left over": sorted(set(found) - set(expected)),
        "other shapes": [
            f"{key}: the file has {list(found[key].shape)}, the model {list(expected[key].shape)}"
            for key in sorted(set(expected) & set(found))
            if found[key].shape != expected[key].shape
        ],
        "with NaN or infinity": not_finite(found),
    }
    if problems := [f"{title} ({len(keys)}): {some(keys)}" for title, keys in differences.items() if keys]:
        raise WeightsError(f"weights: '{source}' doesn't fit the model. " + ". ".join(problems))


def widest_float(source: str, tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The one dtype in which a model can hold these weights without loss.

    Raises:
        WeightsError: Some are in numbers that no model is computed with: whole ones, or floats of 8 bits.
    """
    if others := sorted(name for name, tensor in tensors.items() if tensor.dtype not in FLOATS):
        words = sorted({str(tensors[name].dtype).removeprefix("torch.") for name in others})
        found = f"found {', '.join(words)} in {some(others, 3)}"
        raise WeightsError(f"weights: '{source}' must be in fp32, bf16 or fp16; {found}; take them in one of these")
    return functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values()})


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of those that hold NaN or infinity. One pass that keeps nothing, as both reach the extremes."""
    found = []
    for name, tensor in tensors.items():
        if tensor.is_meta or not tensor.numel() or not tensor.dtype.is_floating_point:
            continue
        values = tensor.detach()
        values = values.float() if values.itemsize == 1 else values  # 8-bit floats have no extremes
        if not all(math.isfinite(end.item()) for end in values.aminmax()):
            found.append(name)
    return sorted(found)


def some(names: list[str], limit: int = 40) -> str:
    """The first of a list of names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
