"""The saver: what it writes, keeps and links; and that no failure of a save costs more than that save."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from traceback import StackSummary
from typing import Any

import pytest
import torch
from bare_trainer import Bare, rows, trainer_of
from composer.core import Callback, Evaluator, State
from composer.loggers import Logger
from composer.utils.parallelism import FSDP2Config
from torch.distributed.checkpoint.api import CheckpointException

from composer_path.checkpoints import saver as saver_module
from composer_path.checkpoints.folder import CheckpointFolder
from composer_path.checkpoints.guarded import GuardedReader
from composer_path.checkpoints.manifest import CheckpointError
from composer_path.checkpoints.newest import newest_whole
from composer_path.checkpoints.resume import Resume
from composer_path.checkpoints.saver import CheckpointSaver
from composer_path.checkpoints.trained_only import TrainedOnly


def train(path: Path, *more: Callback, model: Bare | None = None, resume: bool = False, **keywords: Any) -> Any:
    """Two epochs of three steps of a bare model; `save` holds keywords of the saver."""
    folder, model = CheckpointFolder(path), model or Bare()
    saver = CheckpointSaver(folder, **{"save_interval": "1ba", **keywords.pop("save", {})})
    found = newest_whole(folder) if resume else None
    if found is not None and found.manifest is not None:
        saver.go_on_from(found.manifest)
    callbacks = [*more, Resume(found, False, TrainedOnly(model)), saver]
    trainer = trainer_of(rows([]), model=model, callbacks=callbacks, **keywords)
    try:
        if trainer.state.timestamp < trainer.state.max_duration:
            trainer.fit()
    finally:
        trainer.close()
    return trainer


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallelism", [None, {"fsdp": FSDP2Config()}], ids=["whole", "fsdp2"])
def test_all_kinds_of_runs_write_the_same_entries(tmp_path: Path, parallelism: Any) -> None:
    model = Bare()
    model.model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    train(tmp_path, model=model, parallelism_config=parallelism, optimizers=optimizer, max_duration="1ba")
    assert names(tmp_path) == {"ep0-ba1", "latest"}
    assert names(tmp_path / "ep0-ba1") == {".metadata", "__0_0.distcp", "manifest.json"}
    entries = set(GuardedReader(tmp_path / "ep0-ba1").read_metadata().state_dict_metadata)
    held = {name.split("model.", 1)[1] for name in entries if name.startswith("state.model.")}
    assert held == {"model.1.weight", "model.1.bias"}  # what is trained
    assert {"composer_path", "state.timestamp.Timestamp.batch", "rng.0.python"} <= entries
    assert not [name for name in entries if "metadata" in name or "hostname" in name]


def test_the_newest_few_are_kept_over_all_processes_of_a_run(tmp_path: Path) -> None:
    train(tmp_path, save={"keep": 2}, max_duration="4ba")
    assert names(tmp_path) == {"ep1-ba3", "ep1-ba4", "latest"}
    train(tmp_path, save={"keep": 2}, max_duration="5ba", resume=True)
    assert names(tmp_path) == {"ep1-ba4", "ep1-ba5", "latest"}
    assert os.readlink(tmp_path / "latest") == "ep1-ba5"
    ids = {manifest.run_id for manifest in CheckpointFolder(tmp_path).manifests().values()}
    assert len(ids) == 1  # one run, of two processes


def test_all_are_kept_by_default_and_a_resumed_run_writes_none_of_them_again(tmp_path: Path) -> None:
    train(tmp_path, max_duration="2ba")
    written = (tmp_path / "ep0-ba2" / "manifest.json").stat().st_mtime_ns
    train(tmp_path, max_duration="2ba", resume=True)
    assert names(tmp_path) == {"ep0-ba1", "ep0-ba2", "latest"}
    assert (tmp_path / "ep0-ba2" / "manifest.json").stat().st_mtime_ns == written


def test_a_run_that_is_written_over_goes_when_the_new_one_has_a_whole_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, max_duration="3ba")
    train(tmp_path, max_duration="1ba", save={"overwrite": True})
    assert names(tmp_path) == {"ep0-ba1", "latest"}


def test_a_checkpoint_says_what_it_belongs_to(tmp_path: Path) -> None:
    train(tmp_path, save={"fingerprint": {"seed": 17}}, max_duration="4ba")
    [manifest] = [m for m in CheckpointFolder(tmp_path).manifests().values() if m.step == 4]
    assert (manifest.epoch, manifest.fingerprint, manifest.metric) == (1, {"seed": 17}, None)
    assert manifest.files["__0_0.distcp"][0] == (tmp_path / "ep1-ba4" / "__0_0.distcp").stat().st_size


def test_a_checkpoint_after_an_epochs_last_step_is_of_its_end(tmp_path: Path) -> None:
    train(tmp_path, save={"save_interval": "3ba"}, max_duration="3ba")
    assert names(tmp_path) == {"ep1-ba3", "latest"}


# --- the best one ----------------------------------------------------------------------------------------------------


class Squares(Bare):
    """A model whose evaluations find these metrics in turn."""

    def __init__(self, found: list[float]) -> None:
        super().__init__()
        self.found = iter(found)

    def update_metric(self, batch: Any, outputs: Any, metric: Any) -> None:
        if not metric.weight:
            metric.update(next(self.found))


def test_the_best_is_linked_kept_and_written_when_an_evaluation_finds_it(tmp_path: Path) -> None:
    evaluator = Evaluator(label="heldout", dataloader=rows([]), device_eval_microbatch_size=4)
    more: dict[str, Any] = {"eval_dataloader": evaluator, "eval_interval": "1ba", "max_duration": "6ba"}
    save = {"save_interval": "4ba", "keep": 1, "best": "heldout/square"}
    train(tmp_path, model=Squares([9.0, 3.0, 5.0, float("inf"), 4.0, 7.0]), save=save, **more)
    metrics = {name: manifest.metric for name, manifest in CheckpointFolder(tmp_path).manifests().items()}
    assert metrics == {"ep2-ba6": 7.0, "ep0-ba2": 3.0}
    assert os.readlink(tmp_path / "best") == "ep0-ba2" and os.readlink(tmp_path / "latest").endswith("ba6")


# --- what fails ------------------------------------------------------------------------------------------------------


class Fault:
    """Fails at the n-th call of a kind, from a moment on; counts calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str, at: int) -> None:
        self.at, self.calls, self.active = at, 0, False
        place, name = {"write": (saver_module.dcp, None), "fsync": (os, "fsync"), "replace": (os, "replace")}.get(
            kind, (Path, "rename")
        )
        if kind == "write":
            original_open = io.open

            def spoiled_open(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
                stream = original_open(file, mode, *rest, **more)
                if self.active and "w" in mode and "ba2" in str(file):
                    return _Spoiled(stream, self)
                return stream

            monkeypatch.setattr(io, "open", spoiled_open)
            monkeypatch.setattr(builtins, "open", spoiled_open)
            return
        original: Callable[..., Any] = getattr(place, name)

        def spoiled(*arguments: Any) -> Any:
            self.count()
            return original(*arguments)

        monkeypatch.setattr(place, name, spoiled)

    def count(self) -> None:
        if self.active:
            self.calls += 1
            if self.calls == self.at:
                raise OSError(errno.ENOSPC, "No space left on device")


class _Spoiled(io.BufferedIOBase):
    """A file whose writes are counted."""

    def __init__(self, stream: Any, fault: Fault) -> None:
        self.stream, self.fault = stream, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __enter__(self) -> _Spoiled:
        return self

    def __exit__(self, *error: Any) -> None:
        self.stream.close()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.fault.count()
        return self.stream.write(data)

    def fileno(self) -> int:
        return self.stream.fileno()

    def tell(self) -> int:
        return self.stream.tell()

    def flush(self) -> None:
        self.stream.flush()

    def close(self) -> None:
        self.stream.close()


class Begin(Callback):
    """Lets a fault begin with the second step."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def batch_start(self, state: State, logger: Logger) -> None:
        self.fault.active = state.timestamp.batch.value == 1


def number_of_calls(path: Path, kind: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(patch, kind, at=-1)
        train(path, Begin(fault), max_duration="2ba", save={"keep": 1})
    return fault.calls


@pytest.mark.parametrize("kind", ["write", "fsync", "replace", "rename"])
def test_a_failure_at_any_point_of_a_save_is_one_error_and_costs_that_save_only(tmp_path: Path, kind: str) -> None:
    calls = number_of_calls(tmp_path / "counted", kind)
    assert calls >= {"write": 20, "fsync": 5, "replace": 2, "rename": 2}[kind]
    picked = range(1, calls + 1) if calls < 12 else [1, 2, 3, calls // 2, calls - 2, calls - 1, calls]
    for at in picked:
        path = tmp_path / f"{kind}{at}"
        with pytest.MonkeyPatch.context() as patch:
            fault = Fault(patch, kind, at)
            with pytest.raises(
                CheckpointError, match=r"No space left on device|a write was refused, as by a full disk"
            ):
                train(path, Begin(fault), max_duration="2ba", save={"keep": 1})
        assert not [name for name in names(path) if name.startswith(".ep") and name.endswith(".unfinished")], at
        found = newest_whole(CheckpointFolder(path))
        assert found is not None and found.step in (1, 2), at
        trainer = train(path, max_duration="2ba", save={"keep": 1}, resume=True)  # the same command
        assert trainer.state.timestamp.batch.value == 2
        assert {name for name in names(path) if name.startswith("ep")} == {"ep0-ba2"}


def test_room_is_looked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    monkeypatch.setattr(CheckpointFolder, "staging", lambda *_: pytest.fail("something was written"))
    with pytest.raises(CheckpointError, match=r"ep0-ba1: can't be written \(it takes 0\.07 GB, found 0\.00 GB free\)"):
        train(tmp_path, max_duration="1ba")


def test_a_folder_that_cant_be_written_to_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/checkpoints/ep0-ba1: can't be written \(.*Not a directory"):
        train(tmp_path / "file" / "checkpoints", max_duration="1ba")


def test_a_loaders_worker_that_dies_amid_a_save_is_no_matter_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*_: Any, **__: Any) -> None:
        died = RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. ")
        raise CheckpointException("on one rank", {0: (died, StackSummary())})

    monkeypatch.setattr(saver_module.dcp, "save", save)
    with pytest.raises(RuntimeError, match=r"^DataLoader worker \(pid 5\) is killed by signal"):
        train(tmp_path, max_duration="1ba")
    assert names(tmp_path) == set()
