"""Which checkpoint a run goes on from: the newest whole one of its folder, never a damaged or a foreign one."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from composer.utils import dist

from composer_path.checkpoints.folder import BEST, LATEST, CheckpointFolder, on_first_rank
from composer_path.checkpoints.manifest import MANIFEST, CheckpointError, DamagedError, Manifest, step_of
from composer_path.checkpoints.reading import is_of_this_format

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from; one of an earlier version has no manifest."""

    path: Path
    manifest: Manifest | None

    @property
    def step(self) -> int:
        """How many steps were done; by its name, where nothing else says so."""
        return self.manifest.step if self.manifest is not None else step_of(self.path.name) or 0


def newest_whole(folder: CheckpointFolder, clear: bool = True) -> Found | None:
    """The newest whole checkpoint of a folder; None where none lies there. All ranks call it.

    Damaged checkpoints are named in the log and passed over. What a kill left is removed, unless `clear` is False: then
    the folder's run may be at work.

    Raises:
        CheckpointError: Some lie there and none is whole, or they belong to several runs.
    """
    for name in on_first_rank(folder.clear_unfinished) if clear else ():
        _tell("checkpoint %s was not complete when its process ended; its files were removed", f"{folder}/{name}")
    on_first_rank(lambda: _check_owner(folder))
    damaged: list[str] = []
    for name in on_first_rank(folder.names):
        try:
            manifest = on_first_rank(partial(_manifest, folder, name))
            problems = folder.problems(name, manifest) if manifest is not None else []
        except DamagedError as error:
            problems = [str(error)]
        if not problems:
            for line in damaged:
                _tell("checkpoint %s; an earlier one is taken", line)
            if manifest is None:
                words = (
                    "checkpoint %s is of an earlier version and has no manifest: it can't be told whether it is whole"
                )
                _tell(words, f"{folder}/{name}")
            return Found(folder.path / name, manifest)
        damaged.append(f"{folder}/{name} is damaged: {_some(problems)}")
    if damaged:
        fix = "bring a whole one back from a copy, or give another run_name to start anew"
        raise CheckpointError("; ".join([*damaged, "no whole checkpoint is left", fix]))
    return None


def newest_of_run(folder: CheckpointFolder, run: str) -> Found:
    """The newest whole checkpoint of somebody's run, which may be at work; raises ValueError where it has none."""
    found = newest_whole(folder, clear=False)
    if found is None:
        fix = "trainer.save_interval says when a run saves; or name a checkpoint itself"
        raise ValueError(f"run '{run}': found no checkpoint in '{folder}'; {fix}")
    return found


def named(path: str | Path) -> Found:
    """The checkpoint at a path, which may be a link such as `latest`.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    place = Path(path)
    if not on_first_rank(place.exists):
        raise CheckpointError(f"no checkpoint at '{path}'; name one, such as checkpoints/ep0-ba500 of a run's folder")
    place = place.resolve()  # of a link such as `latest`
    folder = CheckpointFolder(place.parent)
    try:
        manifest = on_first_rank(lambda: _manifest(folder, place.name))
        problems = folder.problems(place.name, manifest) if manifest is not None else []
    except DamagedError as error:
        problems = [str(error)]
    if problems:
        raise CheckpointError(f"checkpoint {place} is damaged: {_some(problems)}; take another one")
    if manifest is None:
        _tell("checkpoint %s has no manifest: it can't be told whether it is whole", place)
    return Found(place, manifest)


def _check_owner(folder: CheckpointFolder) -> None:
    """Raise where checkpoints of several runs lie, the link names one elsewhere, or a folder is in its place."""
    for link in (LATEST, BEST):
        if (place := folder.path / link).is_dir() and not place.is_symlink():
            rule = "must be a link to a checkpoint beside it"
            raise CheckpointError(f"{place}: {rule}, found a folder, as a copy that follows links makes; remove it")
    found: dict[str, str] = {}
    for name, manifest in folder.manifests().items():
        found.setdefault(manifest.run_id, name)
    if len(found) > 1:
        which = ", ".join(sorted(found.values()))
        raise CheckpointError(
            f"{folder}: holds checkpoints of {len(found)} runs, such as {which}; move all but one away"
        )
    target = folder.target(LATEST)
    if target is None or target in folder.names():
        return
    place = folder.path / target
    if place.exists() and place.resolve().parent != folder.path.resolve():
        raise CheckpointError(
            f"{folder.path / LATEST}: must name a checkpoint beside it, found '{target}', of another run; "
            "remove the link to go on with this run's own checkpoints"
        )
    if not place.exists():
        _tell("%s names '%s', which isn't there; the newest whole checkpoint is taken", folder.path / LATEST, target)


def _manifest(folder: CheckpointFolder, name: str) -> Manifest | None:
    """A checkpoint's manifest; None only where it is of an earlier version."""
    manifest = folder.manifest(name)
    if manifest is None and is_of_this_format(folder.path / name):
        raise DamagedError(f"{MANIFEST} is missing")
    return manifest


def _some(problems: list[str]) -> str:
    return ", ".join(problems[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")


def _tell(line: str, *values: object) -> None:
    if dist.get_global_rank() == 0:
        log.warning(line, *values)
