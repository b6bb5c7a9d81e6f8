"""The `.metadata` of a sharded checkpoint: which tensors it holds, and where in its files; read without unpickling it.

torch reads it as a plain pickle, which can run anything. Here its records are made by functions of ours, and what they
say is compared with the files that lie there: so nothing is read beside a file, left unread, or larger than its bytes.
"""

from __future__ import annotations

import gc
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from composer_path.weights.pickle_values import Maker, PickleError, PickleReader
from composer_path.weights.torch_file import DTYPE_NAMES

METADATA = ".metadata"
DATA_FILE = re.compile(r"__\d{1,9}_\d{1,9}\.distcp")
MAX_DIMENSIONS = 16


def read_metadata_file(folder: str | os.PathLike[str]) -> Metadata:
    """The metadata of a sharded checkpoint, checked against its files.

    Raises:
        ValueError: It is damaged, names other things than its own, or its files are others.
    """
    folder = Path(folder)
    path = folder / METADATA
    collecting = gc.isenabled()
    gc.disable()  # of 512 ranks there are a million records, and nothing to collect among them
    try:
        metadata = PickleReader(path.read_bytes(), NAMES, STATES, keys=frozenset({MetadataIndex})).read()
        _check(metadata, folder)
    except (PickleError, AttributeError) as error:  # a record that never got its fields lacks them
        found = str(error) if isinstance(error, PickleError) else "a record without its fields"
        raise ValueError(
            f"checkpoint '{folder}': its {METADATA} must hold records of torch.distributed.checkpoint and nothing "
            f"else, that fit its files; found {found}; take another checkpoint"
        ) from None
    finally:
        if collecting:
            gc.enable()
    if metadata.storage_meta is None:
        metadata.storage_meta = StorageMeta()
    return metadata


# --- its records -----------------------------------------------------------------------------------------------------


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise PickleError(what)


def _is_size(value: Any) -> bool:
    return type(value) is torch.Size


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _is_dict(value: Any) -> bool:
    return type(value) is dict and all(type(key) is str for key in value)


def _is_chunks(value: Any) -> bool:
    return type(value) is list and all(type(chunk) is ChunkStorageMetadata for chunk in value)


def _is_storage(value: Any) -> bool:
    return type(value) is dict and all(type(k) is MetadataIndex and type(v) is _StorageInfo for k, v in value.items())


# The fields of each record, and what each must be; those that may be left out are None then.
FIELDS: Mapping[type, Mapping[str, Callable[[Any], bool]]] = {
    Metadata: {
        "state_dict_metadata": _is_dict,
        "planner_data": _optional(_is_dict),
        "storage_data": _is_storage,
        "storage_meta": _optional(lambda value: type(value) is StorageMeta),
        "version": _optional(_is_text),
    },
    MetadataIndex: {"fqn": _is_text, "offset": _optional(_is_size), "index": _optional(_is_count)},
    TensorStorageMetadata: {
        "properties": lambda value: type(value) is TensorProperties,
        "size": _is_size,
        "chunks": _is_chunks,
    },
    ChunkStorageMetadata: {"offsets": _is_size, "sizes": _is_size},
    BytesStorageMetadata: {},
    _StorageInfo: {
        "relative_path": lambda value: type(value) is str and DATA_FILE.fullmatch(value) is not None,
        "offset": _is_count,
        "length": _is_count,
        "transform_descriptors": lambda value: value is None or value in ([], ()),
    },
    StorageMeta: {
        "checkpoint_id": _optional(_is_text),
        "save_id": _optional(_is_text),
        "load_id": _optional(_is_text),
        "modules": lambda value: type(value) is list and all(type(name) is str for name in value),
    },
}
OPTIONAL = {"planner_data", "storage_meta", "version", "offset", "index", "transform_descriptors"}
OPTIONAL_OF = {_StorageInfo: {"transform_descriptors"}, StorageMeta: {"checkpoint_id", "save_id", "load_id"}}


def _record(kind: type) -> Maker:
    """Makes an empty record; its fields come as its state."""

    def make(*arguments: Any) -> Any:
        _need(not arguments, f"a {kind.__name__} with arguments")
        return object.__new__(kind)

    return Maker(make)


def _fill(record: Any, state: Any) -> None:
    kind = type(record)
    fields = FIELDS[kind]
    _need(type(state) is dict and not vars(record), f"a {kind.__name__} without plain fields, or filled twice")
    for name in state:
        _need(name in fields, f"a {kind.__name__} with a field {str(name)[:80]!r}")
    for name, check in fields.items():
        if name not in state and name in OPTIONAL_OF.get(kind, OPTIONAL):
            object.__setattr__(record, name, None)
            continue
        _need(name in state and check(state[name]), f"a {kind.__name__} whose {name} isn't one")
        object.__setattr__(record, name, state[name])


def _fill_properties(record: TensorProperties, state: Any) -> None:
    """Of what torch keeps about a tensor only its dtype is used; the rest is what every tensor here has."""
    _need(type(state) is tuple and len(state) == 5 and not vars(record), "a TensorProperties without its five fields")
    dtype, layout, requires_grad, memory_format, pin_memory = state
    _need(type(dtype) is torch.dtype and layout is torch.strided, "a tensor of another kind than numbers in a grid")
    _need(type(requires_grad) is bool and type(pin_memory) is bool and memory_format in (0, 1, 2), "such a tensor")
    vars(record).update(vars(TensorProperties(dtype=dtype, requires_grad=requires_grad)))


def _size(numbers: Any) -> torch.Size:
    plain = type(numbers) in (tuple, list) and len(numbers) <= MAX_DIMENSIONS and all(map(_is_count, numbers))
    _need(plain, "sizes that aren't numbers of at least 0")
    return torch.Size(numbers)


def _layout(name: Any) -> torch.layout:
    _need(name == "torch.strided", "a tensor of another kind than numbers in a grid")
    return torch.strided


def _memory_format(number: Any) -> int:
    _need(type(number) is int, "a memory format without a number")
    return number


def _path(*parts: Any) -> str:
    """Where it was written, which nothing asks for."""
    _need(all(map(_is_text, parts)), "a path that isn't text")
    return "/".join(parts)


_MODULE = "torch.distributed.checkpoint"
NAMES: Mapping[str, Any] = {
    **DTYPE_NAMES,
    **{f"{_MODULE}.metadata.{kind.__name__}": _record(kind) for kind in FIELDS if kind is not _StorageInfo},
    f"{_MODULE}.metadata.TensorProperties": _record(TensorProperties),
    f"{_MODULE}.metadata._MEM_FORMAT_ENCODING": Maker(_memory_format),
    f"{_MODULE}.filesystem._StorageInfo": _record(_StorageInfo),
    "torch.Size": Maker(_size),
    "torch.serialization._get_layout": Maker(_layout),
    **{f"{module}.PosixPath": Maker(_path) for module in ("pathlib", "pathlib._local")},
}
STATES: Mapping[type, Callable[[Any, Any], None]] = {
    **dict.fromkeys(FIELDS, _fill),
    TensorProperties: _fill_properties,
}


# --- against its files -----------------------------------------------------------------------------------------------


def _check(metadata: Any, folder: Path) -> None:
    _need(type(metadata) is Metadata, f"a {type(metadata).__name__}")
    stored, wanted = metadata.storage_data, 0
    for name, entry in metadata.state_dict_metadata.items():
        if type(entry) is BytesStorageMetadata:
            _need(MetadataIndex(name) in stored, f"no place of entry {name[:200]!r}")
            wanted += 1
            continue
        _need(type(entry) is TensorStorageMetadata, f"an entry {name[:200]!r} of another kind")
        _check_cover(name, entry)
        for chunk in entry.chunks:
            info = stored.get(MetadataIndex(name, chunk.offsets))
            _need(info is not None, f"no place of entry {name[:200]!r}")
            num_bytes = math.prod(chunk.sizes) * entry.properties.dtype.itemsize
            _need(num_bytes <= info.length, f"entry {name[:200]!r} larger than its {info.length} bytes")
        wanted += len({tuple(chunk.offsets) for chunk in entry.chunks})
    _need(wanted == len(stored), "places of entries that aren't there")
    for name, way in (metadata.planner_data or {}).items():
        plain = type(way) is tuple and all(type(step) in (str, int) for step in way)
        _need(plain and name in metadata.state_dict_metadata, f"a way to {name[:200]!r} that is none")
    spans: dict[str, list[tuple[int, int]]] = {}
    for info in stored.values():
        spans.setdefault(info.relative_path, []).append((info.offset, info.offset + info.length))
    for file, of_file in spans.items():
        path = folder / file
        _need(path.is_file() and not path.is_symlink(), f"no plain file {file}")
        of_file.sort()
        after = [start for start, _ in of_file[1:]] + [path.stat().st_size]
        apart = all(end <= start for (_, end), start in zip(of_file, after, strict=True))
        _need(apart, f"entries of {file} over each other or beyond its end")


def _check_cover(name: str, entry: TensorStorageMetadata) -> None:
    """The chunks of a tensor are all of it, once: a hole would stay what the memory held before."""
    size, dimensions = entry.size, len(entry.size)
    boxes = []
    for chunk in entry.chunks:
        _need(len(chunk.offsets) == len(chunk.sizes) == dimensions, f"chunks of entry {name[:200]!r} that don't fit it")
        ends = tuple(start + length for start, length in zip(chunk.offsets, chunk.sizes, strict=True))
        _need(all(map(int.__le__, ends, size)), f"chunks of entry {name[:200]!r} beyond its size")
        if math.prod(chunk.sizes):
            boxes.append((tuple(chunk.offsets), ends))
    volume = sum(math.prod(map(int.__sub__, ends, starts)) for starts, ends in boxes)
    _need(volume == math.prod(size), f"chunks of entry {name[:200]!r} that aren't the whole of it")
    # Sorted by the dimension that is cut most often, a chunk can only meet those that begin before it ends.
    cut = max(range(dimensions), key=lambda d: len({starts[d] for starts, _ in boxes}), default=0)
    boxes.sort(key=lambda box: box[0][cut:] + box[0][:cut])
    for at, (starts, ends) in enumerate(boxes):
        for other_starts, other_ends in boxes[at + 1 :]:
            if not dimensions or other_starts[cut] >= ends[cut]:
                break
            pairs = zip(starts, ends, other_starts, other_ends, strict=True)
            apart = any(end <= other_start or other_end <= start for start, end, other_start, other_end in pairs)
            _need(apart, f"chunks of entry {name[:200]!r} over each other")
