"""What is there whole or not at all: written under another name, then renamed."""

from __future__ import annotations

import os
import shutil
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


def replace_files(folder: Path, write: Callable[[Path], object], is_own: Callable[[str], bool], last: str) -> None:
    """Replace a folder's files by new ones, which are complete before the first of the earlier ones goes.

    `write` gets an empty folder. Of the earlier files those go that are `is_own`; the rest is somebody else's. `last`
    is the one without which nobody reads the others: it goes first, and comes last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    new = (
        folder / f".{os.getpid()}{TEMPORARY_SUFFIX}"
    )  # inside, as the folder may be a mount, a link or somebody's place
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir()
        write(new)
        (folder / last).unlink(missing_ok=True)
        for path in folder.iterdir():
            if is_own(path.name):
                path.unlink()
        for path in sorted(new.iterdir(), key=lambda path: path.name == last):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def sync_path(path: Path) -> None:
    """Return only when a power cut can no longer take a file, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
