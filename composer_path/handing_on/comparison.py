"""Two models' tensors side by side: which differ, and by how much; read one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from composer_path.handing_on.other_settings import other_settings
from composer_path.handing_on.our_names import our_tensors
from composer_path.weights.tensor_file import (
    WeightsError,
    files_of_folder,
    read_tensor_file,
    shapes_of_file,
    shapes_of_folder,
)
from composer_path.weights.whole_folder import WholeFolder, whole_folder

CHUNK = 1 << 22  # elements that are compared at once


@dataclass(frozen=True)
class Entry:
    """A tensor that is read when it is asked for."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Difference:
    """What two tensors of one name and shape differ in.

    Attributes:
        elements: How many numbers a tensor has.
        differing: How many of them differ.
        max_abs: The largest difference; infinite where one is no finite number and the other is another.
        max_rel: The same, relative to the largest number of the first.
        dtypes: Of both, where they aren't the same.
    """

    elements: int
    differing: int
    max_abs: float
    max_rel: float
    dtypes: tuple[str, str] | None = None


@dataclass
class Comparison:
    """All differences of A and B, by the tensors' names."""

    only_in_a: list[str]
    only_in_b: list[str]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    tensors: dict[str, Difference] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """Whether all tensors are there twice, with the same shapes, dtypes and numbers, and read in the same way."""
        same = all(one.differing == 0 and one.dtypes is None for one in self.tensors.values())
        return same and not (self.only_in_a or self.only_in_b or self.shapes or self.settings)

    def modules(self) -> dict[str, dict[str, Any]]:
        """Sums by module, the first word of a name, and of all."""
        sums: dict[str, dict[str, Any]] = {}
        for name, one in self.tensors.items():
            for module in (name.partition(".")[0], "in all"):
                row = sums.setdefault(
                    module,
                    {"tensors": 0, "differ": 0, "elements": 0, "differing": 0, "max_abs": 0.0, "max_rel": 0.0},
                )
                row["tensors"] += 1
                row["differ"] += one.differing > 0
                for key in ("elements", "differing"):
                    row[key] += getattr(one, key)
                for key in ("max_abs", "max_rel"):
                    row[key] = max(row[key], getattr(one, key))
        total = sums.pop("in all", None)
        return dict(sorted(sums.items())) | ({"in all": total} if total else {})

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data; tensors that are the same are left out, but for their sums."""
        differing = {name: one for name, one in self.tensors.items() if one.differing or one.dtypes}
        return {
            "equal": self.equal,
            "only_in_a": self.only_in_a,
            "only_in_b": self.only_in_b,
            "settings": {name: list(pair) for name, pair in self.settings.items()},
            "shapes": {name: [list(shape) for shape in pair] for name, pair in self.shapes.items()},
            "tensors": {name: asdict(one) for name, one in differing.items()},
            "modules": self.modules(),
        }


def compare(a: str | Path, b: str | Path) -> Comparison:
    """Compare the tensors of two files or folders.

    Folders with whole models of different kinds are compared by our names, all others by those that they have, and
    these by their `config.json`, too.

    Raises:
        ValueError: There are no tensors at one of the places, or they can't be read.
    """
    first, second = _sides(Path(a), Path(b))
    both = [name for name in first if name in second]
    shapes = {name: (first[name].shape, second[name].shape) for name in both if first[name].shape != second[name].shape}
    settings = other_settings(Path(a), Path(b)) if _are_of_one_kind(Path(a), Path(b)) else {}
    found = Comparison(sorted(first.keys() - second.keys()), sorted(second.keys() - first.keys()), shapes, settings)
    for name in both:
        if name not in shapes:
            found.tensors[name] = difference(first[name].read(), second[name].read())
    return found


def _whole(path: Path) -> WholeFolder | None:
    return whole_folder(path) if path.is_dir() else None


def _are_of_one_kind(a: Path, b: Path) -> bool:
    one, other = _whole(a), _whole(b)
    return (one and one.kind) == (other and other.kind)


def _sides(a: Path, b: Path) -> tuple[dict[str, Entry], dict[str, Entry]]:
    if _are_of_one_kind(a, b):
        return _entries(a), _entries(b)
    wholes = [_whole(path) for path in (a, b)]
    first, second = (
        _entries(path) if whole is None else {name: _loaded(value) for name, value in our_tensors(whole).items()}
        for path, whole in zip((a, b), wholes, strict=True)
    )
    if None in wholes:  # of a language model's folder beside a whole model
        first = first if wholes[0] else _as_language_model(first)
        second = second if wholes[1] else _as_language_model(second)
    return first, second


def _as_language_model(side: dict[str, Entry]) -> dict[str, Entry]:
    inside = any(name.endswith("embed_tokens.weight") for name in side)
    return {f"language_model.{name}": entry for name, entry in side.items()} if inside else side


def _loaded(value: Tensor) -> Entry:
    return Entry(tuple(value.shape), lambda: value)


def _entries(path: Path) -> dict[str, Entry]:
    """The tensors of a file, or of all files that a folder's weights are in."""
    if not path.exists():
        raise WeightsError(f"weights: no file or folder '{path}'")
    found: dict[str, Entry] = {}
    files = files_of_folder(path) if path.is_dir() else [path]
    if path.is_dir() and files[0].suffix == ".safetensors":
        shapes_of_folder(path)  # refuses what two shards hold, or the index names and none holds
    for file in files:
        if file.suffix != ".safetensors":
            found |= {name: _loaded(value) for name, value in read_tensor_file(file).items()}
            continue
        if not file.is_file():
            raise WeightsError(f"weights: no file '{file}'")
        found |= {name: Entry(shape, partial(_read, file, name)) for name, shape in shapes_of_file(file).items()}
    return found


def _read(file: Path, name: str) -> Tensor:
    return read_tensor_file(file, {name}.__contains__)[name]


def difference(a: Tensor, b: Tensor) -> Difference:
    """What two tensors of one shape differ in, in pieces; numbers that are both NaN are the same."""
    differing, max_abs, largest = 0, 0.0, 0.0
    for one, other in _pieces(a, b):
        unlike = (one != other) & ~(one.isnan() & other.isnan())
        differing += int(unlike.sum())
        finite = one[one.isfinite()]
        largest = max(largest, float(finite.abs().max()) if finite.numel() else 0.0)
        if unlike.any():
            gap = float((one[unlike] - other[unlike]).abs().max())
            max_abs = max(max_abs, gap if gap == gap else float("inf"))
    words = str(a.dtype).removeprefix("torch."), str(b.dtype).removeprefix("torch.")
    relative = max_abs / largest if largest else (float("inf") if max_abs else 0.0)
    return Difference(a.numel(), differing, max_abs, relative, None if a.dtype == b.dtype else words)


def _pieces(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    first, second = a.reshape(-1), b.reshape(-1)
    for start in range(0, first.numel(), CHUNK):
        piece = slice(start, start + CHUNK)
        yield first[piece].to(torch.float64), second[piece].to(torch.float64)


def told(found: Comparison, most: int = 20) -> Iterator[str]:
    """A comparison in words, a line each."""
    for words, names in (("only in A", found.only_in_a), ("only in B", found.only_in_b)):
        if names:
            yield f"{words} ({len(names)}): {', '.join(names[:most])}{' ...' if len(names) > most else ''}"
    for name, (in_a, in_b) in list(found.shapes.items())[:most]:
        yield f"other shapes: {name}: {list(in_a)} in A, {list(in_b)} in B"
    for name, (in_a_value, in_b_value) in list(found.settings.items())[:most]:
        yield f"other settings: {name}: {in_a_value!r:.60} in A, {in_b_value!r:.60} in B"
    dtypes = Counter(one.dtypes for one in found.tensors.values() if one.dtypes is not None)
    for (in_a_word, in_b_word), count in dtypes.items():
        yield f"other dtypes: {count} tensors are {in_a_word} in A, {in_b_word} in B"
    yield from _table(found.modules())
    differing = [(name, one) for name, one in found.tensors.items() if one.differing]
    if differing:
        yield f"largest differences ({len(differing)} tensors differ):"
    for name, one in sorted(differing, key=lambda pair: pair[1].max_abs, reverse=True)[:most]:
        yield f"  {name}: {one.max_abs:.3g} (relative {one.max_rel:.3g}), {one.differing:,} of {one.elements:,} differ"
    yield "equal" if found.equal else "different"


def _table(modules: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    rows = [["module", "tensors", "differ", "elements", "differing", "max abs", "max rel"]]
    for name, sums in modules.items():
        counts = [f"{sums[key]:,}" for key in ("tensors", "differ", "elements", "differing")]
        rows.append([name, *counts, f"{sums['max_abs']:.3g}", f"{sums['max_rel']:.3g}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
