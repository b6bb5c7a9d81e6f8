"""Settings of two models' `config.json` that differ: equal tensors that are read otherwise are another model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from composer_path.storage.json_object import read_json_object

# What no number depends on: dtypes are those of the tensors.
_UNTOLD = {
    "version",
    "transformers_version",
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
    "auto_map",
}
ABSENT = "(not there)"

Settings = dict[str, Any]


def other_settings(a: Path, b: Path) -> dict[str, tuple[Any, Any]]:
    """By key, what differs between the configurations of two folders of one kind; nothing where one has none.

    What only one of them says is passed over where another version of transformers wrote it, with defaults of its own.

    Raises:
        ValueError: One can't be read.
    """
    files = [path / "config.json" for path in (a, b)]
    if not all(file.is_file() for file in files):
        return {}
    first, second = map(read_json_object, files)
    same_version = first.get("transformers_version") == second.get("transformers_version")
    one, other = dict(_leaves(first)), dict(_leaves(second))
    names = one.keys() | other.keys() if same_version else one.keys() & other.keys()
    pairs = {name: (one.get(name, ABSENT), other.get(name, ABSENT)) for name in sorted(names)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if key in _UNTOLD:
            continue
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
