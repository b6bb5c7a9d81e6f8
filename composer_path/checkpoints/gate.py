"""No checkpoint runs code: every pickle in one is searched for what it would call before it is loaded.

Composer and torch load checkpoints as full pickles. Composer asks a function, named in the environment, before it reads
each file; `is_harmless` is that function. Nothing that it inspects is called.
"""

from __future__ import annotations

import io
import os
import pickle
import pkgutil
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from composer.core import State

# What Composer's own checkpoints name beyond what torch itself always allows.
HARMLESS = re.compile(
    r"datetime\.(timedelta|datetime)|numpy\.ndarray|numpy\.dtype|numpy\.dtypes\.\w+"
    r"|numpy\.(_core|core)\.multiarray\.(_reconstruct|scalar)|torch\.torch_version\.TorchVersion|collections\.OrderedDict"
)
# What a sharded checkpoint's `.metadata` names: its own records, shapes, dtypes and paths.
HARMLESS_METADATA = re.compile(
    r"torch\.distributed\.checkpoint\.metadata\.\w+|torch\.distributed\.checkpoint\.filesystem\._StorageInfo"
    r"|torch\.(Size|device|bool|u?int\d+|b?float\d+|complex\d+|strided)|torch\.serialization\._get_layout"
    r"|pathlib\.(Posix|Windows|PurePosix|PureWindows)?Path|collections\.OrderedDict"
)
METADATA = ".metadata"


def require_safe_checkpoints() -> None:
    """Let Composer ask `is_harmless` before it reads a checkpoint, and never evaluate text out of one.

    Raises:
        RuntimeError: This Composer evaluates it somewhere else than the supported version does.
    """
    os.environ["CHECKPOINT_VALIDATION_FUNCTION"] = "composer_path.checkpoints.gate.is_harmless"
    # Composer evaluates the text of algorithms in a checkpoint to add them; here algorithms come from the YAML alone.
    if not hasattr(State, "_apply_required_algorithms"):
        raise RuntimeError("this version of Composer restores algorithms in an unknown way; use mosaicml 0.32.1")
    State._apply_required_algorithms = lambda self, *args, **kwargs: None  # type: ignore[method-assign]


def is_harmless(path: str | Path, specs: Iterable[tuple[int, int]] | None = None) -> bool:
    """Whether nothing in a checkpoint file could run code when it is loaded.

    It is a single-file checkpoint, or `.metadata` or a `.distcp` file of a sharded one; `specs` are offset and length
    in bytes of the `.distcp` entries that will be read.

    Raises:
        ValueError: Lists the names it would call.
    """
    path = Path(path)
    if path.name == METADATA:
        names, harmless = metadata_names(path), HARMLESS_METADATA
    else:
        names, harmless = pickled_names(path, specs), HARMLESS
    if refused := {name for name in names if not harmless.fullmatch(name)}:
        raise ValueError(
            f"checkpoint '{path}' would call {', '.join(sorted(refused))} when it is loaded, which no checkpoint of "
            "this project needs; it is refused. Export the weights to safetensors where it came from, and load those"
        )
    return True


def pickled_names(path: Path, specs: Iterable[tuple[int, int]] | None = None) -> set[str]:
    """Names that the file's torch pickles would call, beyond torch's own safe ones."""
    if specs is None:
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    names: set[str] = set()
    with path.open("rb") as file:
        for offset, length in specs:
            part = io.BufferedReader(_FilePart(file, offset, length))
            names.update(torch.serialization.get_unsafe_globals_in_checkpoint(part))
    return names


def metadata_names(path: Path) -> set[str]:
    """Names that a sharded checkpoint's `.metadata`, a plain pickle, would call; reading stops at the first bad one."""
    found: list[str] = []

    class Names(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            found.append(f"{module}.{name}")
            if not HARMLESS_METADATA.fullmatch(found[-1]):
                raise pickle.UnpicklingError(found[-1])
            return super().find_class(module, name)

    with path.open("rb") as file:
        try:
            Names(file).load()
        except pickle.UnpicklingError:
            if not found or HARMLESS_METADATA.fullmatch(found[-1]):
                raise ValueError(f"'{path}' is damaged: it is no pickle") from None
    return set(found)


def read_pickle(path: str | Path) -> Any:
    """Read a single-file checkpoint with torch's safe unpickler; tensors are mapped, not copied."""
    is_harmless(path)
    allowed = [pkgutil.resolve_name(name) for name in pickled_names(Path(path))]
    allowed += [getattr(np.dtypes, name) for name in np.dtypes.__all__]  # what numpy.dtype(...) is an instance of
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


class _FilePart(io.RawIOBase):
    """A stretch of an open file as a file of its own, without copying it."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        super().__init__()
        self.file, self.offset, self.length, self.position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        self.position = min(max(start + offset, 0), self.length)
        return self.position

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.offset + self.position)
        data = self.file.read(min(len(buffer), self.length - self.position))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)
