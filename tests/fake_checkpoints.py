"""Small folders that are checkpoints to whoever only looks at their files."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from composer_path.checkpoints.folder import CheckpointFolder
from composer_path.checkpoints.manifest import Manifest, name_of
from composer_path.storage.places import Folder


def fake_checkpoint(folder: CheckpointFolder, step: int, run_id: str = "a_run", **more: Any) -> Path:
    """A whole checkpoint of some bytes."""
    name = name_of(0, step)
    staged = folder.staging(name)
    for file, size in ((".metadata", 300), ("__0_0.distcp", 2000), ("__1_0.distcp", 1000)):
        (staged / file).write_bytes(random.Random(f"{file}{step}").randbytes(size))
    place = Folder(staged)
    files = {file: place.digest(file) for file in place.files()}
    folder.publish(name, staged, Manifest(run_id, step, 0, files, {"seed": 17}, **more))
    return folder.path / name


def old_checkpoint(folder: CheckpointFolder, step: int) -> Path:
    """One that a version without manifests began to write: its `.metadata`, which would come last, isn't there."""
    path = folder.path / name_of(0, step)
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"begun")
    return path
