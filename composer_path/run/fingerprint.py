"""A run's fingerprint: every setting of its YAML, and what its files held; and what of it a resumed run may change.

It stands in each checkpoint's manifest. At a start it is compared: a difference is applied from there on, or refused by
name; none is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from composer_path.own_parts.imports import file_of, source_of
from composer_path.run.place import on_this_disk
from composer_path.shards.lengths import short_hash

# Where files lie and who is told; what files hold is compared by its hash, so a folder may move. Their values may hold
# passwords, so a fingerprint has their hashes only.
_PLACES = re.compile(
    r"save_root|imports|variables\..*|loggers\..*|(.*\.)?(local|remote|path|weights|pooler_weights|lengths|log_dir|load_path|streams\.[^.]+\.(local|remote))"
)
# What a resumed run must have as it began: random numbers, model (also how its frozen weights are rounded, beside which
# the others learned), how its data are prepared. The order of samples
# is compared by the stream, which takes another one where an epoch begins.
_FIXED = re.compile(
    r"seed|tokenizer\..*|model\..*|optimizer\.(name|fused|amsgrad|block_size|layer_wise_lr_decay|groups(\.\d+\.match)?)"
    r"|train_loader\.dataset\.(template|template\..*|max_seq_len|image_position|fit|max_pixels|scale_levels|decoder)"
    r"|train_loader\.dataset\.streams(\..*)?|execution\.frozen_weights|files\..*"
)
_FREE = re.compile(r"model\.attention|train_loader\.dataset\.streams\.[^.]+\.(download_\w+|validate_hash|keep_zip)")


def fingerprint(settings: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    """A run's fingerprint.

    Args:
        settings: Of the YAML, complete and plain.
        files: Hashes of what was read, by what it is.
    """
    found = {f"files.{name}": value for name, value in files.items()}
    for path, value in _flat(settings):
        found[path] = short_hash(repr(value).encode()) if value is not None and _PLACES.fullmatch(path) else value
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What changed and is applied, and what changed and can't be: a line each."""
    applied, refused = [], []
    for path in sorted({*before, *now}):
        old, new = before.get(path), now.get(path)
        if old == new and type(old) is type(new):
            continue
        if _PLACES.fullmatch(path):
            applied.append(f"{path}: another place")
        elif _FIXED.fullmatch(path) and not _FREE.fullmatch(path):
            refused.append(f"{_name(path)}: this run began with {_show(old)}, found {_show(new)}")
        else:
            applied.append(f"{path}: {_show(old)} before, now {_show(new)}")
    return applied, refused


def hash_of_file(path: Path) -> str:
    """xxh64 of a file's content."""
    state = xxhash.xxh64()
    with open(path, "rb") as file:
        while data := file.read(1 << 24):
            state.update(data)
    return state.hexdigest()


def hash_of_files(paths: Sequence[Path]) -> str:
    """One hash of several files' names and contents."""
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(hash_of_file, paths))
    return short_hash(repr([(path.name, digest) for path, digest in zip(paths, digests, strict=True)]).encode())


def weights_files(settings: Mapping[str, Any]) -> dict[str, list[Path]]:
    """Files that the weights of frozen modules come from; trained ones come from the checkpoint."""
    model = settings["model"]
    frozen = {name for name in ("vision_encoder", "projector", "language_model") if name not in model["trainable"]}
    found = {}
    for name in sorted(frozen):
        keys = ("weights", "pooler_weights", "path")
        place = next((model[name][key] for key in keys if model[name].get(key) is not None), None)
        if place is not None:
            path = on_this_disk(place)
            kinds = (".safetensors", ".bin", ".pt", ".pth")
            held = [file for file in path.iterdir() if file.suffix in kinds] if path.is_dir() else [path]
            found[name] = sorted(held)
    return found


def import_hashes(imports: Sequence[str]) -> dict[str, str]:
    """What the modules and files of one's own hold now, by their names without places."""
    found = {}
    for name in imports:
        file = file_of(name)
        files = sorted(file.rglob("*.py")) if file is not None and file.is_dir() else [file] if file else []
        found[f"imports.{source_of(name)}"] = hash_of_files(files)
    return found


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, member in value.items():
            yield from _flat(member, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value and all(isinstance(member, Mapping) for member in value):
        for at, member in enumerate(value):
            yield from _flat(member, f"{path}.{at}")
    else:
        yield path, value


def _name(path: str) -> str:
    return f"what {path.removeprefix('files.')} holds" if path.startswith("files.") else path


def _show(value: Any) -> str:
    return "nothing" if value is None else f"'{value}'" if isinstance(value, str) else str(value)
