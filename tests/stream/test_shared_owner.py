"""What killed runs leave in shared memory goes with the next start, and never what a living one uses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import gettempdir

import pytest
from streaming.base.constant import SHM_TO_CLEAN
from tiny_shards import write_set
from warm_process import popen

from composer_path.stream import shared_owner
from composer_path.stream.shared_owner import MEMORY, OWNER, SharedOwner, remove_left_overs

pytestmark = pytest.mark.skipif(not MEMORY.is_dir(), reason="shared memory has no folder here")
NUMBER = 710_000  # of no other test

READ = """
import itertools, sys, time
from streaming.base.shared import prefix
from tiny_shards import build_loader
prefix._each_prefix_int = lambda: itertools.count(int(sys.argv[3]))
loader = build_loader(local=sys.argv[1], num_workers=2)
batches = iter(loader)
next(batches)
print(loader.dataset._shm_prefix_int, flush=True)
time.sleep(float(sys.argv[2]))
"""


def reading(folder: Path, seconds: float) -> tuple[subprocess.Popen, int]:
    """A process with workers that has read its first batch, and its number."""
    words = [sys.executable, "-c", READ, str(folder), str(seconds), str(NUMBER)]
    process = popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def names(folder: Path = MEMORY) -> set[str]:
    """Those of this file's numbers."""
    return {name for name in os.listdir(folder) if name.startswith(str(NUMBER)[:4])}


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_what_five_killed_runs_left_is_gone_after_a_start_and_a_living_runs_memory_stays(tmp_path: Path) -> None:
    folder = write_set(tmp_path)
    assert names() == set()
    alive, number = reading(folder, 120)
    try:
        its = names()
        assert {f"{number}_owner", f"{number}_locals"} <= its
        for _ in range(5):
            process, taken = reading(folder, 120)
            assert taken > number
            kill(process)
        assert len(names() - its) > 5
        for _ in range(3):  # another program that starts at the same moment may hold a number for an instant
            process, _ = reading(folder, 0)
            assert process.wait(60) == 0
            if names() == its:
                break
        assert names() == its
    finally:
        kill(alive)
    for _ in range(50):  # its workers end a moment after it, and hold the number until then
        remove_left_overs()
        if not names():
            break
        time.sleep(0.1)
    assert names() == set()


def test_what_lies_under_a_number_without_an_owner_is_another_programs() -> None:
    paths = [MEMORY / f"{NUMBER + 50}_{name}" for name in SHM_TO_CLEAN]
    for path in paths:
        path.touch()
    owner = MEMORY / f"{NUMBER + 50}_owner"
    owner.touch()  # of a run that was killed before it had taken the number
    try:
        remove_left_overs()
        assert not owner.exists() and all(path.exists() for path in paths)
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def test_a_fork_holds_the_number_as_long_as_it_lives_and_never_gives_it_back() -> None:
    owner = SharedOwner(NUMBER + 60)
    owner.note()
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(done)
        owner.give_back()
        os.read(ready, 1)
        os._exit(0)
    os.close(owner.file)  # as a kill does
    with pytest.raises(BlockingIOError):
        SharedOwner(NUMBER + 60)
    os.close(done)
    os.waitpid(child, 0)
    remove_left_overs()
    assert not owner.path.exists()


def test_one_that_somebody_removes_in_the_same_moment_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    held = shared_owner.fcntl.flock

    def removed_first(file: int, how: int) -> None:
        (MEMORY / f"{NUMBER + 65}_{OWNER}").unlink()
        held(file, how)

    monkeypatch.setattr(shared_owner.fcntl, "flock", removed_first)
    with pytest.raises(BlockingIOError, match="somebody has just removed it"):
        SharedOwner(NUMBER + 65)
    assert not names()


def test_another_users_number_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = MEMORY / f"{NUMBER + 70}_owner"
    owner.write_bytes(b"1")
    try:
        monkeypatch.setattr(shared_owner.os, "geteuid", lambda: os.getuid() + 1)
        remove_left_overs()
        assert owner.exists()
    finally:
        owner.unlink()


def test_lock_files_of_no_memory_go_when_they_are_old() -> None:
    old, new = (Path(gettempdir(), f"{NUMBER + number}_cache_filelock") for number in (80, 81))
    for path in (old, new):
        path.touch()
    os.utime(old, (time.time() - 100,) * 2)
    try:
        remove_left_overs()
        assert not old.exists() and new.exists()
    finally:
        new.unlink()
