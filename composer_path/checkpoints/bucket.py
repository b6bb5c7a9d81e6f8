"""The checkpoints of a run whose `save_root` is a bucket: written on the disk of each node, then sent there.

An object appears whole, and a checkpoint with its manifest, which is sent last and deleted first.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from composer.utils import dist

from composer_path.checkpoints.folder import LATEST, CheckpointFolder, reason, share_of
from composer_path.checkpoints.manifest import MANIFEST, CheckpointError, DamagedError, Manifest, step_of
from composer_path.storage.places import Bucket, copy_to_disk


class BucketFolder(CheckpointFolder):
    """Checkpoints below an address.

    Args:
        url: Where they lie.
        path: A folder on each node's disk, where one is written before it is sent, and brought before it is read.
    """

    def __init__(self, url: str, path: Path) -> None:
        super().__init__(path)
        self.place = Bucket(url)

    def __str__(self) -> str:
        return str(self.place)

    def names(self) -> list[str]:
        """Names of all checkpoints, whole or not, the newest first."""
        steps = {name: step for name in self._files() if (step := step_of(name)) is not None}
        return sorted(steps, key=lambda name: (-steps[name], name))

    def _files(self) -> dict[str, dict[str, int]]:
        """Sizes of the objects of each checkpoint."""
        found: dict[str, dict[str, int]] = {}
        for path, size in self.place.files().items():
            name, slash, file = path.partition("/")
            if slash:
                found.setdefault(name, {})[file] = size
        return found

    def manifest(self, name: str) -> Manifest | None:
        """A checkpoint's manifest; None where it has none."""
        try:
            return Manifest.from_bytes(self.place.read(f"{name}/{MANIFEST}"), name)
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise DamagedError(f"{MANIFEST} can't be read ({error})") from None

    def problems(self, name: str, manifest: Manifest) -> list[str]:
        """Bring a checkpoint's files to each node, each rank a share of them, and see what is wrong with them."""
        ranks, rank = dist.get_local_world_size(), dist.get_local_rank()
        files, found, failure = share_of(manifest.files, ranks, rank), [], None
        (self.path / name).mkdir(parents=True, exist_ok=True)
        for file in files:
            if not list(self._problems(name, {file: files[file]})):
                continue  # it lies here from an earlier start
            try:
                copy_to_disk(self.place, f"{name}/{file}", self.path / name / file)
            except FileNotFoundError:
                found.append(f"{file} is missing")
            except OSError as error:  # the store, or this node's disk
                failure = reason(error)
        found += self._problems(name, {file: files[file] for file in files if f"{file} is missing" not in found})
        gathered = dist.all_gather_object((found, failure))
        if failure := next((met for _, met in gathered if met), None):
            raise CheckpointError(f"checkpoint {self}/{name}: can't be read: {failure}")
        return sorted({problem for of_rank, _ in gathered for problem in of_rank})

    def bring(self, name: str) -> Path:
        """Bring a checkpoint with its manifest to this disk; `name` may be a link, such as `latest`.

        Raises:
            CheckpointError: There is none, or it is damaged.
        """
        name = name if step_of(name) is not None else self.target(name) or name
        try:
            manifest = self.manifest(name)
            problems = self.problems(name, manifest) if manifest is not None else []
        except DamagedError as error:
            manifest, problems = None, [str(error)]
        if problems:
            raise CheckpointError(f"checkpoint {self}/{name} is damaged: {problems[0]}; take another one")
        if manifest is None:
            fix = "name a run, or a checkpoint in it, such as checkpoints/ep0-ba500"
            raise CheckpointError(f"no checkpoint at '{self}/{name}'; {fix}")
        (self.path / name / MANIFEST).write_bytes(manifest.to_bytes())
        return self.path / name

    def clear_unfinished(self) -> list[str]:
        """Remove what a kill left, here and in the bucket; returns the names of checkpoints that were being written."""
        super().clear_unfinished()
        cleared = [name for name, files in self._files().items() if step_of(name) is not None and MANIFEST not in files]
        for name in cleared:
            self.remove(name)
        return cleared

    def send(self, name: str, staged: Path, files: Iterable[str]) -> None:
        """Send the files that this rank wrote."""
        for file in files:
            self.place.write_file(f"{name}/{file}", staged / file)

    def publish(self, name: str, staged: Path, manifest: Manifest) -> None:
        """Let a sent checkpoint appear; objects of an earlier one of its name that it doesn't have are deleted."""
        sent = self._files().get(name, {})
        if missing := [file for file, (size, _) in manifest.files.items() if sent.get(file) != size]:
            raise CheckpointError(f"{missing[0]} didn't arrive whole in {self.place}")
        self.place.delete(f"{name}/{file}" for file in sent if file not in manifest.files)
        self.place.write(f"{name}/{MANIFEST}", [manifest.to_bytes()])
        self.point(LATEST, name)
        shutil.rmtree(staged, ignore_errors=True)

    def point(self, link: str, name: str) -> None:
        """Set a link: an object that holds the name."""
        self.place.write(link, [name.encode()])

    def target(self, link: str) -> str | None:
        """What a link names; None where there is none."""
        try:
            return self.place.read(link).decode(errors="replace").strip()
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        """Delete a checkpoint; its manifest goes first."""
        if step_of(name) is None:
            return
        files = self._files().get(name, {})
        self.place.delete(f"{name}/{file}" for file in sorted(files, key=lambda file: file != MANIFEST))
        shutil.rmtree(self.path / name, ignore_errors=True)

    def forget(self, name: str) -> None:
        """Remove what was brought here of a checkpoint."""
        if dist.get_local_rank() == 0:
            shutil.rmtree(self.path / name, ignore_errors=True)
