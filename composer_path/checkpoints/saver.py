"""Writes a run's checkpoints, and keeps the newest few and the best one.

Written are the weights that are trained, and what Composer adds: moments of the optimizer, schedulers, time, random
states, states of callbacks and algorithms, and the loader's place in the data (`ConversationDataset.state_dict`).
Frozen weights are not: they come from their own files, or from the seed, at every start. All kinds of runs, on one rank
or sharded over many, write the same: a folder of torch.distributed.checkpoint, which all of them read.
"""

from __future__ import annotations

import logging
import math
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist, reproducibility
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from composer_path.checkpoints.folder import BEST, CheckpointFolder, on_first_rank, reason
from composer_path.checkpoints.manifest import CheckpointError, DamagedError, Manifest, name_of
from composer_path.guards.ending import lost_worker
from composer_path.storage.places import Folder

log = logging.getLogger(__name__)

FORMAT = 1  # of what is in a checkpoint; stands in it as `composer_path`
_ROOM = 64 * 2**20  # bytes beside the tensors


class CheckpointSaver(Callback):
    """Saves at intervals and at the run's end.

    Args:
        folder: Where.
        save_interval: A Composer time such as `500ba` or `1ep`; a number counts epochs.
        keep: How many of the newest to keep; -1 for all.
        best: A metric of an evaluation, such as `heldout/token_loss`: the checkpoint with the lowest is linked as
            `best` and kept beside the newest. One is written after each evaluation that improves on it.
        fingerprint: Of the run; kept in the manifests.
        overwrite: Remove another run's checkpoints from the folder when the first of this one is whole.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        save_interval: str | int,
        keep: int = -1,
        best: str | None = None,
        fingerprint: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.due = create_interval_scheduler(save_interval, include_end_of_training=True)
        self.folder, self.keep, self.best = folder, keep, best
        self.fingerprint, self.overwrite = fingerprint or {}, overwrite
        self.run_id = dist.all_gather_object(uuid.uuid4().hex)[0]
        self.history: list[dict[str, Any]] = []
        self.saved_step: int | None = None  # of the checkpoint that is as the run is now
        self._measured: tuple[int, float] | None = None
        self._due_at_epochs_end = False

    def go_on_from(self, manifest: Manifest) -> None:
        """Be the saver of the run that wrote this."""
        self.run_id, self.history, self.saved_step = manifest.run_id, list(manifest.history), manifest.step

    def after_load(self, state: State, logger: Logger) -> None:
        """Let those go that an earlier process had no time to."""
        if self.saved_step is not None:
            on_first_rank(self._rotate)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Note the metric that `best` goes by."""
        if self.best is not None:
            label, _, name = self.best.partition("/")
            if state.dataloader_label != label and state.dataloader_label in state.eval_metrics:  # another one's end
                return
            self._measured = state.timestamp.batch.value, float(state.eval_metrics[label][name].compute())

    eval_standalone_end = eval_end  # of an evaluation outside of training

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Save when an interval ends, or a better model is there; after an epoch's last step, with the epoch's end."""
        if not self.will_save(state, Event.BATCH_CHECKPOINT):
            return
        if state.timestamp.batch_in_epoch == state.dataloader_len:
            self._due_at_epochs_end = True
        else:
            self.save(state, logger)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Likewise."""
        if self.will_save(state, Event.EPOCH_CHECKPOINT) or self._due_at_epochs_end:
            self._due_at_epochs_end = False
            self.save(state, logger)

    def will_save(self, state: State, event: Event) -> bool:
        """Whether a checkpoint is written at this event; all ranks ask."""
        return self.due(state, event) or self._improves(state.timestamp.batch.value)

    def _metric(self, step: int) -> float | None:
        """The metric, where it was measured at this step and is a number."""
        measured, metric = self._measured or (-1, math.nan)
        return metric if measured == step and math.isfinite(metric) else None

    def _improves(self, step: int) -> bool:
        """Whether the evaluation of this step was better than those of all checkpoints."""
        metric = self._metric(step)
        if self.best is None or metric is None:
            return False
        others = on_first_rank(lambda: [manifest.metric for manifest in self.folder.manifests().values()])
        return all(metric < other for other in others if other is not None)

    def save(self, state: State, logger: Logger) -> None:
        """Write a checkpoint of this step, unless it is written; all ranks call it.

        Raises:
            CheckpointError: It can't be written; the earlier ones are as they were.
        """
        step, epoch = state.timestamp.batch.value, state.timestamp.epoch.value
        if self.saved_step == step:
            return
        name, place = name_of(epoch, step), self.folder.path
        newest = on_first_rank(lambda: next(iter(self.folder.manifests()), None))
        kept = f"the newest whole checkpoint is {newest}" if newest else "there is no earlier one"
        fix = f"{kept}; give {place} more room, or the right to write, and start again with the same command"
        try:
            content = contents(state)
            self._check_room(content)
            staged = on_first_rank(lambda: self.folder.staging(name))
            staged.mkdir(parents=True, exist_ok=True)  # on nodes that share no disk with the first
            try:
                written = self._write(name, content, staged)
                manifest = Manifest(
                    self.run_id, step, epoch, written, self.fingerprint, self.history, self._metric(step)
                )
                on_first_rank(lambda: self.folder.publish(name, staged, manifest))
            except BaseException:
                if dist.get_local_rank() == 0:
                    shutil.rmtree(staged, ignore_errors=True)
                raise
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {place / name}: can't be written ({error}); {fix}") from None
        self.saved_step = step
        on_first_rank(self._rotate)

    def _check_room(self, content: Mapping[str, Any]) -> None:
        """Raise where it won't fit, before anything is written."""
        needed = sum(dist.all_gather_object(bytes_of(content, dist.get_global_rank() == 0))) + _ROOM

        def check() -> None:
            self.folder.path.mkdir(parents=True, exist_ok=True)
            if (free := self.folder.free_bytes()) < needed:
                raise CheckpointError(f"it takes {needed / 1e9:.2f} GB, found {free / 1e9:.2f} GB free")

        on_first_rank(check)

    def _write(self, name: str, content: dict[str, Any], staged: Path) -> dict[str, tuple[int, str]]:
        """Write all ranks' parts; returns size and hash of each file, read back by the rank that wrote it."""
        try:
            planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
            dcp.save(content, storage_writer=dcp.FileSystemWriter(staged), planner=planner)
        except CheckpointException as error:
            met = [failure for failure, _ in error.failures.values()]
            if died := [one for one in met if lost_worker(one)]:
                raise died[0] from None
            raise CheckpointError("; ".join(sorted(set(map(reason, met))))) from None
        place, rank, problem = Folder(staged), dist.get_global_rank(), None
        on_disk: dict[str, tuple[int, str]] = {}
        try:
            mine = [f for f in place.files() if f.startswith(f"__{rank}_") or (rank == 0 and not f.startswith("__"))]
            on_disk = {file: place.digest(file) for file in mine}
            self.folder.send(name, staged, mine)
        except OSError as error:
            problem = reason(error)
        gathered = dist.all_gather_object((on_disk, problem))
        if problems := sorted({found for _, found in gathered if found}):
            raise CheckpointError("; ".join(problems))
        return {file: entry for files, _ in gathered for file, entry in files.items()}

    def _rotate(self) -> None:
        """Let the oldest go; of another run that is written over, all."""
        manifests = self.folder.manifests()
        ours = [name for name, manifest in manifests.items() if manifest.run_id == self.run_id]
        measured = {name: metric for name in ours if (metric := manifests[name].metric) is not None}
        best = min(measured, key=lambda name: measured[name]) if self.best is not None and measured else None
        if best is not None and self.folder.target(BEST) != best:
            self.folder.point(BEST, best)
        for name in [name for name, manifest in manifests.items() if self.overwrite and name not in ours]:
            self.folder.remove(name)
        if self.keep < 0:
            return
        earlier = [name for name in self.folder.names() if self._is_earlier(name)]
        for name in [*ours, *earlier][self.keep :]:
            if name != best:
                self.folder.remove(name)

    def _is_earlier(self, name: str) -> bool:
        """Whether it is whole, but has no manifest, as of an earlier version of this project."""
        path = self.folder.path / name
        whole = path.is_file() or (path / ".metadata").is_file()
        try:
            return whole and self.folder.manifest(name) is None
        except DamagedError:
            return False


def contents(state: State) -> dict[str, Any]:
    """What a checkpoint of this moment holds; also the template that one is read into."""
    for optimizer in state.optimizers:  # Composer's layer_freezing takes weights out of one, and forgets their moments
        held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        for weight in [weight for weight in optimizer.state if id(weight) not in held]:
            del optimizer.state[weight]
    for algorithm in state.algorithms:
        if hasattr(algorithm, "show_trained_weights"):  # of averages, amid an evaluation
            algorithm.show_trained_weights()
    everything = state.state_dict()
    # By name rather than in a list of pairs, of which torch would write one pickle, tensors included.
    everything["algorithms"] = dict(everything["algorithms"])
    for unused in ("metadata", "integrations"):  # versions and the machine's name, which nothing reads
        everything.pop(unused, None)
    return {"composer_path": FORMAT, "state": everything, "rng": reproducibility.get_rng_state()}


def bytes_of(content: Any, is_first: bool) -> int:
    """Bytes of the tensors that this rank writes: its shards, and on rank 0 what all ranks have."""
    if isinstance(content, Mapping):
        return sum(bytes_of(value, is_first) for value in content.values())
    if isinstance(content, list | tuple):
        return sum(bytes_of(value, is_first) for value in content)
    if isinstance(content, Tensor):
        local = content.to_local() if hasattr(content, "to_local") else content
        return local.nbytes if is_first or local is not content else 0
    return 0
