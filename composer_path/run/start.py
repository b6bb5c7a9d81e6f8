"""How a run starts: anew, or where which checkpoint left it; what of its settings changed since; and its saver."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer.core import Callback
from composer.utils import dist

from composer_path.checkpoints.folder import on_first_rank
from composer_path.checkpoints.manifest import CheckpointError, Manifest
from composer_path.checkpoints.newest import Found, named, newest_whole
from composer_path.checkpoints.resume import Resume
from composer_path.checkpoints.saver import CheckpointSaver
from composer_path.checkpoints.trained_only import TrainedOnly
from composer_path.own_parts.registry import all_parts
from composer_path.run.fingerprint import differences, fingerprint, hash_of_files, import_hashes, weights_files
from composer_path.run.place import SendFiles, address_of, checkpoints_of, folder_of
from composer_path.storage.places import is_remote

log = logging.getLogger(__name__)


@dataclass
class Start:
    """What a run begins with."""

    found: Found | None  # the checkpoint that it goes on from
    history: list[dict[str, Any]]  # what changed at which step
    callbacks: Sequence[Callback]


def choose_start(settings: Mapping[str, Any], trained_only: TrainedOnly, tokenizer: str, data: str) -> Start:
    """Find the checkpoint to go on from, and compare the run that wrote it with this one. All ranks call it.

    Args:
        settings: Of the YAML, plain.
        trained_only: What keeps frozen weights out of them.
        tokenizer: A hash of it.
        data: A hash of it.

    Raises:
        CheckpointError: None is whole, or a setting differs that can't change within a run.
    """
    section, root = settings["trainer"], settings["save_root"]
    folder = checkpoints_of(root, section["run_name"])
    files = on_first_rank(lambda: {name: hash_of_files(held) for name, held in weights_files(settings).items()})
    own = on_first_rank(lambda: import_hashes(settings["imports"]))
    for name, held in own.items():
        kinds = [f"{part.kind} {part.name}" for part in all_parts() if f"imports.{part.source}" == name]
        _tell("%s: code of one's own, hash %s: %s", name, held, ", ".join(kinds))
    ours = fingerprint(settings, files | {"tokenizer": tokenizer}) | {"data": data} | own
    saver = None
    if section["save_interval"] is not None:
        keep, best = section["save_num_checkpoints_to_keep"], section["best"]
        saver = CheckpointSaver(folder, section["save_interval"], keep, best, ours, section["save_overwrite"])
    found, weights_only = newest_whole(folder) if section["autoresume"] else None, False
    if found is None and section["load_path"] is not None:
        found, weights_only = named(section["load_path"]), section["load_weights_only"]
    history: list[dict[str, Any]] = []
    if found is None or weights_only:
        _tell("a new run%s", f", with the weights of {found.path}" if found else "")
    else:
        where = (
            f"{folder}/{found.path.name}" if found.path.parent == folder.path else found.path
        )  # of a bucket's, there
        _tell("goes on from %s, after step %s", where, found.step)
        if found.manifest is not None:
            history = [*found.manifest.history, *_compare(found.manifest, ours, where)]
            if saver is not None and found.path.parent.resolve() == folder.path.resolve():
                saver.go_on_from(found.manifest)
    if saver is not None:
        saver.history = history
    resume = Resume(found, weights_only, trained_only, folder)
    callbacks = [resume, *([saver] if saver else [])]
    if is_remote(root):
        place = root, section["run_name"]
        callbacks.append(SendFiles(address_of(*place), folder_of(*place)))
    return Start(None if weights_only else found, history, callbacks)


def _compare(before: Manifest, now: Mapping[str, Any], where: str | Path) -> list[dict[str, Any]]:
    """What changed, as an entry of the history."""
    applied, refused = differences(before.fingerprint, now)
    if refused:
        fix = "set them back, or give another trainer.run_name to start anew"
        lines = "\n  ".join(refused)
        raise CheckpointError(
            f"checkpoint {where}: can't go on with other settings than it began with:\n  {lines}\n  {fix}"
        )
    for line in applied:
        _tell("from step %s on: %s", before.step, line)
    return [{"step": before.step, "changes": applied}] if applied else []


def _tell(line: str, *values: object) -> None:
    if dist.get_global_rank() == 0:
        log.info(line, *values)
