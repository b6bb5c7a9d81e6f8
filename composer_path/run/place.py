"""Where a run's files lie: a folder, or a bucket, to which they are sent from a folder on each node's disk."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from composer_path.asking.run_table import CONFIG
from composer_path.checkpoints.bucket import BucketFolder
from composer_path.checkpoints.folder import CheckpointFolder
from composer_path.checkpoints.newest import newest_of_run
from composer_path.storage.atomic import TEMPORARY_SUFFIX
from composer_path.storage.errors import shown
from composer_path.storage.lock import LOCK, locked
from composer_path.storage.places import Bucket, copy_to_disk, is_remote

log = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"
WEIGHTS_KEYS = {"weights", "pooler_weights"}  # of the vision encoder's and projector's sections


def folder_of(save_root: str, run_name: str) -> Path:
    """A run's folder on this disk; of one whose `save_root` is a bucket, below the folder of temporary files."""
    if not is_remote(save_root):
        return Path(save_root, run_name)
    place = hashlib.sha256(save_root.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"composer_path-{os.getuid()}", place, run_name)


def address_of(save_root: str, run_name: str) -> str:
    """Where a run's files are in the end, for words to a user."""
    return f"{save_root.rstrip('/')}/{run_name}" if is_remote(save_root) else str(folder_of(save_root, run_name))


def alone_in(folder: Path) -> AbstractContextManager[None]:
    """Hold a run's folder; of several processes of one run, the first holds it for all.

    Raises:
        ValueError: Another run is there.
    """
    if int(os.environ.get("RANK", "0")):
        return nullcontext()
    return locked(folder, "run", "wait for it, or give another trainer.run_name")


def checkpoints_of(save_root: str, run_name: str) -> CheckpointFolder:
    """The checkpoints of a run."""
    path = folder_of(save_root, run_name) / CHECKPOINTS
    if is_remote(save_root):
        return BucketFolder(f"{address_of(save_root, run_name)}/{CHECKPOINTS}", path)
    return CheckpointFolder(path)


@contextmanager
def brought_here(address: str) -> Iterator[Path]:
    """The checkpoint that an address means, two folders below its run's configuration, while the caller reads it.

    Args:
        address: Of a run in a bucket, whose newest whole checkpoint is meant, or of one of its checkpoints.

    Raises:
        ValueError: No checkpoint lies there, or none that is whole.
    """
    url = address.rstrip("/")
    above, _, name = url.rpartition("/")
    run, _, folder = above.rpartition("/")
    run, name = (run, name) if folder == CHECKPOINTS else (url, "")
    with tempfile.TemporaryDirectory() as path:
        checkpoints = BucketFolder(f"{run}/{CHECKPOINTS}", Path(path, "run", CHECKPOINTS))
        checkpoint = checkpoints.bring(name or newest_of_run(checkpoints, shown(run)).path.name)
        with suppress(FileNotFoundError):  # the caller may have another
            copy_to_disk(Bucket(run), CONFIG, Path(path, "run", CONFIG))
        yield checkpoint


def with_local_weights(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings whose weights files lie on this disk: those of a bucket are brought here, once for each node."""
    model = {name: dict(part) if isinstance(part, Mapping) else part for name, part in settings["model"].items()}
    for part in (model["vision_encoder"], model["projector"]):
        for key in WEIGHTS_KEYS & part.keys():
            if part[key] is not None and is_remote(part[key]):
                part[key] = str(_bring(part[key]))
    return {**settings, "model": model}


def on_this_disk(path: str) -> Path:
    """Where a file of weights lies on this disk, once `with_local_weights` has brought it."""
    folder, _, name = path.rpartition("/")
    return folder_of(folder, "weights") / name if is_remote(path) else Path(path)


def _bring(url: str) -> Path:
    folder, _, name = url.rpartition("/")
    path, place, failure = on_this_disk(url), Bucket(folder), None
    if dist.get_local_rank() == 0:
        try:
            if not path.is_file() or path.stat().st_size != place.size(name):
                path.parent.mkdir(parents=True, exist_ok=True)
                unfinished = path.with_name(f"{name}{TEMPORARY_SUFFIX}")
                copy_to_disk(place, name, unfinished)
                unfinished.replace(path)
        except OSError as error:
            failure = OSError(f"weights: can't bring '{shown(url)}' here: {error}")
    if failure := next(filter(None, dist.all_gather_object(failure)), None):
        raise failure
    return path


class SendFiles(Callback):
    """Sends what a run writes besides its checkpoints to a bucket: after each checkpoint, at its end, and what is left.

    Args:
        url: Of the run in the bucket.
        folder: Of the run on this disk.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.place, self.folder = Bucket(url), folder
        self.sent: dict[Path, tuple[int, int]] = {}

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Send what is new."""
        self.send()

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Likewise."""
        self.send()

    def fit_end(self, state: State, logger: Logger) -> None:
        """Likewise."""
        self.send()

    def post_close(self) -> None:
        """Loggers write until they are closed."""
        try:
            self._send_new()
        except OSError as error:
            log.warning("%s: what was written last wasn't sent, it lies in %s (%s)", self.place, self.folder, error)

    def send(self) -> None:
        """Send what is new, from one rank of each node; all ranks raise what one of them met."""
        failure: OSError | None = None
        try:
            self._send_new()
        except OSError as error:
            failure = OSError(f"{error} (it lies in {self.folder})")
        if failure := next(filter(None, dist.all_gather_object(failure)), None):
            raise failure

    def _send_new(self) -> None:
        for path in self._files() if dist.get_local_rank() == 0 else ():
            status = path.stat()
            now = status.st_size, status.st_mtime_ns
            if self.sent.get(path) != now:
                self.place.write_file(path.relative_to(self.folder).as_posix(), path)
                self.sent[path] = now

    def _files(self) -> Iterator[Path]:
        """All files but checkpoints and unfinished ones; a model's configuration comes after its weights."""
        found = []
        for root, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if not (name.endswith(TEMPORARY_SUFFIX) or name == CHECKPOINTS)]
            found += [Path(root, name) for name in names if not name.endswith(TEMPORARY_SUFFIX) and name != LOCK]
        yield from sorted(found, key=lambda path: (path.name == "config.json", path))
