"""A checkpoint's manifest: which files it consists of, and what it belongs to. It comes last.

It tells damage, not malice: who can write a checkpoint can write a fitting manifest, so the gate looks at what is
loaded, whatever stands here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import xxhash

MANIFEST = "manifest.json"
VERSION = 1
NAME = re.compile(r"ep(\d+)-ba(\d+)")  # of a checkpoint's folder: epochs and steps that were done


class CheckpointError(ValueError):
    """A checkpoint that can't be written, read or taken; the message says where, why, and what to do."""


class DamagedError(CheckpointError):
    """A checkpoint that is there, and isn't whole."""


@dataclass(frozen=True)
class Manifest:
    """What stands in a manifest.

    Args:
        run_id: Of the run from its first step on, through all resumes.
        step: How many steps were done.
        epoch: How many epochs were done.
        files: Size in bytes and xxh64 of each file beside the manifest.
        fingerprint: Of the run, see `composer_path.run.fingerprint`.
        history: What was used from which step on.
        metric: The metric that `best` goes by, at this step; None where it was not measured.
    """

    run_id: str
    step: int
    epoch: int
    files: Mapping[str, tuple[int, str]]
    fingerprint: Mapping[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    metric: float | None = None
    version: int = VERSION

    def to_bytes(self) -> bytes:
        """As it is written, with a hash of itself."""
        content = asdict(self)
        content["xxh64"] = xxhash.xxh64_hexdigest(json.dumps(content, sort_keys=True).encode())
        return json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "") -> Manifest:
        """Read that of a checkpoint of this name; ValueError where it is none, was changed, or is of another step."""
        content = json.loads(data)
        if not isinstance(content, dict) or content.get("version") != VERSION:
            found = content.get("version") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"its version must be {VERSION}, found {found!r}")
        try:
            content["files"] = {str(name): (int(size), str(xxh64)) for name, (size, xxh64) in content["files"].items()}
            read = cls(**{key: value for key, value in content.items() if key != "xxh64"})
        except (TypeError, ValueError, AttributeError, KeyError):
            raise ValueError("its entries aren't those of a manifest") from None
        plain = all(re.fullmatch(r"[\w.-]+", name) and name not in (".", "..", MANIFEST) for name in read.files)
        values = (read.run_id, str), (read.step, int), (read.epoch, int), (read.fingerprint, dict), (read.history, list)
        if not (read.files and plain and all(isinstance(value, kind) for value, kind in values)):
            raise ValueError("its entries aren't those of a manifest")
        if read.to_bytes() != data:
            raise ValueError("it was changed after it was written")
        if step_of(name) is not None and name != (own := name_of(read.epoch, read.step)):
            raise ValueError(f"it is that of {own}, so its folder was renamed or copied; name it {own} again")
        return read


def name_of(epoch: int, step: int) -> str:
    """Of a checkpoint's folder."""
    return f"ep{epoch}-ba{step}"


def step_of(name: str) -> int | None:
    """The step in a checkpoint's name; None where it is no checkpoint's."""
    match = NAME.fullmatch(name.removesuffix("-rank0.pt"))
    return int(match[2]) if match else None
