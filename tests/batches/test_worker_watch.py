"""Workers that stand still: a loader that waits for them ends in one named error, and a program ends all the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import warm_process
from tiny_shards import write_set
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from composer_path.batches.loader import start_worker
from composer_path.batches.whole_epoch import WholeEpochLoader
from composer_path.batches.worker_watch import WorkerWatch
from composer_path.stream.error import StreamError
from composer_path.stream.guarded import GuardedStreamingDataset

TIMEOUT = 1.5


def collate(samples: list[dict[str, Any]]) -> SimpleNamespace:
    """With a tensor, whose memory a frozen worker doesn't hand over even if it has sent the batch."""
    return SimpleNamespace(ids=torch.tensor([sample["id"] for sample in samples]), num_samples=len(samples))


def loader_over(folder: Path, num_workers: int, keep: bool) -> WholeEpochLoader:
    dataset = GuardedStreamingDataset(local=str(folder), batch_size=2)
    settings: dict[str, Any] = {"batch_size": 2, "collate_fn": collate, "worker_init_fn": start_worker}
    return WholeEpochLoader(
        dataset, num_workers=num_workers, persistent_workers=keep, timeout=TIMEOUT, prefetch_factor=2, **settings
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("watch") / "set")


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """A hang is a failure, not the end of all tests."""

    def late(*_: Any) -> None:
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def freeze(worker: Any) -> None:
    os.kill(worker.pid, signal.SIGSTOP)


def assert_ends_named(loader: WholeEpochLoader, batches: Iterator[Any], frozen: int) -> None:
    with pytest.raises(StreamError) as caught:
        list(batches)
    assert f"stalled: no batch came within {TIMEOUT} s" in str(caught.value)
    assert f"worker {frozen} (process {loader.watch.workers[frozen].pid}) is stopped" in str(caught.value)
    assert not any(worker.is_alive() for worker in loader.watch.workers)
    with pytest.raises(StreamError, match="stalled"):  # the next epoch, too
        list(loader)


@pytest.mark.parametrize(("num_workers", "keep"), [(1, True), (3, False)])
def test_a_worker_frozen_at_the_start_is_named(
    folder: Path, num_workers: int, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = DataLoader.__iter__

    def start_and_freeze(self: Any) -> _BaseDataLoaderIter:
        batches: Any = start(self)
        freeze(batches._workers[0])
        return batches

    monkeypatch.setattr(DataLoader, "__iter__", start_and_freeze)
    loader = loader_over(folder, num_workers, keep)
    assert_ends_named(loader, iter(loader), 0)


@pytest.mark.parametrize(("num_workers", "keep"), [(1, True), (2, False), (4, True)])
def test_a_worker_frozen_when_it_has_sent_batches_is_named(folder: Path, num_workers: int, keep: bool) -> None:
    loader = loader_over(folder, num_workers, keep)
    batches = iter(loader)
    for _ in range(num_workers + 1):
        next(batches)
    time.sleep(0.3)  # they send what they may, ahead
    freeze(loader.watch.workers[-1])
    assert_ends_named(loader, batches, num_workers - 1)


def test_a_worker_that_ends_while_the_others_are_ended_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's handler raises wherever the program is at that moment."""
    loader = loader_over(folder, 2, True)
    batches = iter(loader)
    next(batches)
    worker = loader.watch.workers[1]
    freeze(worker)
    in_main, ended = threading.main_thread, list[int]()

    def end_one() -> threading.Thread:
        if not ended:
            ended.append(worker.pid)
            os.kill(worker.pid, signal.SIGKILL)
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        return in_main()

    monkeypatch.setattr(threading, "main_thread", end_one)
    before = signal.getsignal(signal.SIGCHLD)
    loader.watch.end()
    assert ended == [worker.pid] and not any(one.is_alive() for one in loader.watch.workers)
    assert signal.getsignal(signal.SIGCHLD) is before


def test_a_worker_frozen_between_epochs_is_named(folder: Path) -> None:
    loader = loader_over(folder, 2, True)
    assert sum(batch.num_samples for batch in loader) == 40
    freeze(loader.watch.workers[0])
    assert_ends_named(loader, iter(loader), 0)


def test_only_time_spent_waiting_counts(folder: Path) -> None:
    loader = loader_over(folder, 1, False)
    batches = iter(loader)
    next(batches)
    time.sleep(TIMEOUT + 0.5)
    assert len(list(batches)) == 19 and loader.watch.found is None


def test_without_a_timeout_nothing_is_watched() -> None:
    watch = WorkerWatch(0)
    with watch.waiting():
        time.sleep(0.6)
    assert watch.found is None


def test_a_program_ends_though_a_worker_is_frozen(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import test_worker_watch as t\n"
        "loader = t.loader_over(Path(sys.argv[1]), 2, True); batches = iter(loader); next(batches)\n"
        "t.freeze(loader.watch.workers[0]); print(loader.watch.workers[0].pid)"
    )
    places = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    line = [sys.executable, "-c", code, str(folder)]
    run = warm_process.popen(line, env=os.environ | {"PYTHONPATH": places}, stdout=subprocess.PIPE, text=True)
    output, _ = run.communicate(timeout=50)
    assert run.returncode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(output), 0)
