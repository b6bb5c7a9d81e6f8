"""What is there whole or not at all: written under another name, then renamed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

# A name that no finished file has; what is left of it belongs to a process that was killed.
TEMPORARY_SUFFIX = ".unfinished"


def write_whole(path: Path, write: Callable[[BinaryIO], object], *, durable: bool = False, mode: int = 0o666) -> None:
    """Write a file whole or not at all; an earlier one of this name stays until the new one is complete.

    `write` gets the open file; a library that writes to a path takes `file.name`. If `durable`, no power cut can take
    the file afterwards. `mode` are its rights, less the user's mask: `0o600` for what only its owner may read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two processes that write the same file apart.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with open(unfinished, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            rights = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            write(file)
        # A library may have put a file of its own there: safetensors does, for its owner's eyes only.
        if stat.S_IMODE(unfinished.stat().st_mode) != rights:
            unfinished.chmod(rights)
        if durable:
            sync_path(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if durable:
        sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Return only when a power cut can no longer take a file, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
