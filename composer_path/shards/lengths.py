"""How long each sample of a set is: measured once, kept in a small file, so that batches can be balanced unread."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from composer_path.shards.index import is_lengths
from composer_path.storage.places import Bucket, Folder, open_place

FORMAT = 1
_COLUMNS = ("tokens", "answer_tokens", "images")
DAMAGE = (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error)  # of a file that numpy reads
MEASURE_COMMAND = "composer-path lengths"


class LengthsError(ValueError):
    """The lengths of a set aren't there, or were measured for another tokenizer, template, encoder or set."""


@dataclass(frozen=True)
class LengthsKey:
    """What the lengths of a set depend on; other lengths belong to another key."""

    index: str  # hash of the set's index, which holds the shards' names, sizes and checksums; "" of none yet
    tokenizer: str  # hashes of batches/measure.py
    template: str
    num_image_tokens: int  # placeholders of an image
    max_seq_len: int | None  # where samples are cut, tokens
    image_position: str
    format: int = FORMAT  # of the file

    @property
    def file_name(self) -> str:
        """The file's name: lengths of several tokenizers or templates can lie side by side."""
        return f"lengths-{short_hash(json.dumps(asdict(self), sort_keys=True).encode())}.npz"

    def of_set(self, index: bytes) -> LengthsKey:
        """The key of a set, by the content of its index.json; the rest stays."""
        return replace(self, index=short_hash(index))

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What another key says otherwise; hashes are named only."""
        found = [(name, other.get(name), value) for name, value in asdict(self).items() if other.get(name) != value]
        return [_NAMES.get(name) or f"{name} ({theirs} there, {ours} here)" for name, theirs, ours in found]


_NAMES = {"index": "the set (its index.json)", "tokenizer": "tokenizer", "template": "template"}


@dataclass(frozen=True)
class SampleLengths:
    """Counts of each sample of a set, in its order; a sample that can't be used is one token without an answer."""

    tokens: Int32[np.ndarray, " samples"]  # placeholders included
    answer_tokens: Int32[np.ndarray, " samples"]  # those with a label
    images: Int32[np.ndarray, " samples"]  # that were not cut away

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.tokens)


def write_lengths(place: Folder | Bucket, key: LengthsKey, lengths: SampleLengths) -> str:
    """Write the lengths of a set, whole or not at all; returns the file's name."""
    file = io.BytesIO()
    arrays = {name: getattr(lengths, name) for name in _COLUMNS}
    np.savez_compressed(file, key=np.frombuffer(json.dumps(asdict(key)).encode(), np.uint8), **arrays)
    place.write(key.file_name, [file.getvalue()], durable=True)
    return key.file_name


def read_lengths(place: Folder | Bucket, key: LengthsKey, num_samples: int | None = None) -> SampleLengths:
    """Read the lengths of a set from beside it, or from a folder of such files; `num_samples` if it is known.

    A `LengthsError` says that there are none for this key (and what differs, if there are others), or damaged ones.
    """
    try:
        data = place.read(key.file_name)
    except (FileNotFoundError, NotADirectoryError):
        raise LengthsError(_missing(place, key)) from None
    try:
        lengths, found = _parse(data)
    except DAMAGE as error:
        found_text = f"found a damaged file ({type(error).__name__})"
        raise LengthsError(f"{place}: {key.file_name}: {found_text}; delete it, and {_fix()}") from None
    if found != asdict(key) or num_samples not in (None, len(lengths)):
        counts = "" if num_samples in (None, len(lengths)) else f" ({len(lengths)} samples, the set has {num_samples})"
        raise LengthsError(f"{place}: {key.file_name}: found lengths of another set{counts}; delete it, and {_fix()}")
    return lengths


def has_lengths(place: Folder | Bucket, key: LengthsKey) -> bool:
    """Whether a place holds whole lengths for this key."""
    try:
        read_lengths(place, key)
    except LengthsError:
        return False
    return True


def _parse(data: bytes) -> tuple[SampleLengths, dict[str, Any]]:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        columns = {name: arrays[name].astype(np.int32, casting="safe") for name in _COLUMNS}
        key = json.loads(arrays["key"].tobytes())
    if len({column.shape for column in columns.values()}) != 1 or columns["tokens"].ndim != 1:
        raise ValueError
    return SampleLengths(**columns), key


def _missing(place: Folder | Bucket, key: LengthsKey) -> str:
    """Why there are none: nobody measured, or somebody measured for something else."""
    others: list[list[str]] = []
    for name in place.files():
        if is_lengths(name):
            try:
                others.append(key.differences(_parse(place.read(name))[1]))
            except DAMAGE:
                continue
    if not others:
        return f"{place}: found no lengths of this set's samples; {_fix()}"
    nearest = ", ".join(sorted(others, key=len)[0])
    return f"{place}: found lengths of samples, but measured for another {nearest}; {_fix()}"


def _fix() -> str:
    return f"measure with {MEASURE_COMMAND} and this run's YAML"


def lengths_place(url: str | Path, folder: str | None) -> Folder | Bucket:
    """Where a set's lengths lie: in the folder that was named for them, else beside the set."""
    return open_place(folder if folder is not None else url)


def short_hash(data: bytes) -> str:
    """A hash that tells contents apart, 16 digits."""
    return hashlib.sha256(data).hexdigest()[:16]
