"""The folder of a run's checkpoints: which are whole, how one appears and how one goes.

A checkpoint is written beside, as `.ep0-ba4.unfinished`, and renamed when its manifest is there. One that goes is
renamed first. So whatever a kill leaves is told by its name, and cleared at the next start.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from composer.utils import dist

from composer_path.checkpoints.manifest import MANIFEST, CheckpointError, DamagedError, Manifest, step_of
from composer_path.storage.atomic import TEMPORARY_SUFFIX, sync_path, write_whole
from composer_path.storage.places import Folder

LATEST, BEST = "latest", "best"  # links to the newest checkpoint, and to the best one
_GONE = f".gone{TEMPORARY_SUFFIX}"  # ends the name of one that is being removed
_OLD_LATEST = "latest-rank0.pt"  # Composer's name for it

Value = TypeVar("Value")


class CheckpointFolder:
    """A folder with a checkpoint in each `ep<epochs>-ba<steps>`, which all ranks can reach.

    Checkpoints of earlier versions, which have no manifest, may lie there: folders, or files `….pt`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> list[str]:
        """Names of all checkpoints, whole or not, the newest first."""
        found = [entry.name for entry in self.path.iterdir()] if self.path.is_dir() else []
        steps = {name: step for name in found if (step := step_of(name)) is not None}
        return sorted(steps, key=lambda name: (-steps[name], name))

    def manifest(self, name: str) -> Manifest | None:
        """A checkpoint's manifest; None where it has none.

        Raises:
            DamagedError: It can't be read.
        """
        if (self.path / name).is_symlink():
            raise DamagedError(f"it is a link to '{os.readlink(self.path / name)}'; bring the folder itself here")
        try:
            return Manifest.from_bytes((self.path / name / MANIFEST).read_bytes(), name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, RecursionError, OSError) as error:
            raise DamagedError(f"{MANIFEST} can't be read ({error})") from None

    def manifests(self) -> dict[str, Manifest]:
        """The readable manifests of all checkpoints, the newest first."""
        found = {}
        for name in self.names():
            try:
                manifest = self.manifest(name)
            except DamagedError:
                continue
            if manifest is not None:
                found[name] = manifest
        return found

    def problems(self, name: str, manifest: Manifest) -> list[str]:
        """What is wrong with a checkpoint's files; all ranks call it, and each reads its share of them."""
        found = list(self._problems(name, share_of(manifest.files, dist.get_world_size(), dist.get_global_rank())))
        return sorted({problem for of_rank in dist.all_gather_object(found) for problem in of_rank})

    def _problems(self, name: str, files: Mapping[str, tuple[int, str]]) -> Iterator[str]:
        folder = Folder(self.path / name)
        for file, (size, digest) in files.items():
            path = folder.path / file
            if path.is_symlink():
                yield f"{file} is a link"
            elif not path.is_file():
                yield f"{file} is missing"
            else:
                if (found := path.stat().st_size) != size:
                    yield f"{file} has {found:,} bytes instead of {size:,}"
                elif folder.digest(file)[1] != digest:
                    yield f"{file} was changed: its xxh64 isn't the one of its manifest"

    def clear_unfinished(self) -> list[str]:
        """Remove what a kill left; returns the names of the checkpoints that were being written."""
        cleared = []
        for path in sorted(self.path.glob(f".*{TEMPORARY_SUFFIX}")) if self.path.is_dir() else ():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            if not path.name.endswith(_GONE):
                cleared.append(path.name.removeprefix(".").removesuffix(TEMPORARY_SUFFIX))
        for name in self.names():  # of an earlier version: DCP writes its metadata last
            path = self.path / name
            begun = path.is_dir() and not any((path / file).exists() for file in (MANIFEST, ".metadata"))
            if begun and not path.is_symlink() and all(file.suffix in (".distcp", ".tmp") for file in path.iterdir()):
                self.remove(name)
                cleared.append(name)
        return cleared

    def send(self, name: str, staged: Path, files: Iterable[str]) -> None:
        """Bring the files that this rank wrote to where all ranks can reach them; in a folder they are there."""

    def forget(self, name: str) -> None:
        """Remove what was brought here of a checkpoint to be read; in a folder it is the checkpoint itself."""

    def staging(self, name: str) -> Path:
        """Where a checkpoint is written; empty."""
        path = self.path / f".{name}{TEMPORARY_SUFFIX}"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def publish(self, name: str, staged: Path, manifest: Manifest) -> None:
        """Let a written checkpoint appear: its manifest first, then its name, then the link to it."""
        write_whole(staged / MANIFEST, lambda file: file.write(manifest.to_bytes()), durable=True)
        sync_path(staged)
        if os.path.lexists(self.path / name):  # damaged, or of a run that is written over
            self.remove(name)
        staged.rename(self.path / name)
        sync_path(self.path)
        self.point(LATEST, name)

    def point(self, link: str, name: str) -> None:
        """Set a link; one that is there is replaced."""
        fresh = self.path / f".{link}{TEMPORARY_SUFFIX}"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(name)
        os.replace(fresh, self.path / link)
        if link == LATEST:
            (self.path / _OLD_LATEST).unlink(missing_ok=True)
        sync_path(self.path)

    def target(self, link: str) -> str | None:
        """What a link names; None where there is none."""
        try:
            return os.readlink(self.path / link)
        except OSError:
            return None

    def remove(self, name: str) -> None:
        """Remove a checkpoint; its name goes first."""
        gone = self.path / f".{name}{_GONE}"
        shutil.rmtree(gone, ignore_errors=True)
        (self.path / name).rename(gone)
        shutil.rmtree(gone) if gone.is_dir() and not gone.is_symlink() else gone.unlink()

    def free_bytes(self) -> int:
        """What can still be written there."""
        return shutil.disk_usage(self.path).free


def share_of(files: Mapping[str, Any], ranks: int, rank: int) -> dict[str, Any]:
    """The files that one of several ranks looks at."""
    return {name: files[name] for name in sorted(files)[rank::ranks]}


def on_first_rank(work: Callable[[], Value]) -> Value:
    """Do something on rank 0 and return its result on all ranks, or raise there what it met."""
    result: Any = None
    failure: CheckpointError | None = None
    if dist.get_global_rank() == 0:
        try:
            result = work()
        except CheckpointError as error:
            failure = error
        except OSError as error:
            failure = CheckpointError(reason(error))
    result, failure = dist.all_gather_object((result, failure))[0]
    if failure is not None:
        raise failure
    return result


def reason(error: BaseException) -> str:
    """What an error says, of the system's without its number; the system's goes before what it led to."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    error = cause or error
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if "inline_container" in str(error):  # torch's writer of zip files, which forgets the system's words
        return "a write was refused, as by a full disk"
    return str(error)
