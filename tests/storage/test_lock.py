"""One writer a folder: a second one is refused, and a kill leaves the folder free."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from composer_path.storage import lock
from composer_path.storage.lock import LOCK, AnotherAtWork, locked

HOLDS = """
import sys, time
from pathlib import Path
from composer_path.storage.lock import locked
with locked(Path(sys.argv[1]), "run", "wait"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_gone_even_by_a_kill(tmp_path: Path, repo_root: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(repo_root)}
    words = [sys.executable, "-c", HOLDS, str(tmp_path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        found = rf"one run at a time, found another one at work \(process {process.pid} on .+\); wait"
        with pytest.raises(ValueError, match=found), locked(tmp_path, "run", "wait"):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with locked(tmp_path, "run", "wait"):
        pass


def test_a_second_thread_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path, "run", "wait"):
        with pytest.raises(AnotherAtWork, match="in this process"), locked(tmp_path, "run", "wait"):
            pass
        assert (tmp_path / LOCK).exists()


def test_parts_are_held_beside_each_other_and_never_with_the_whole(tmp_path: Path) -> None:
    with locked(tmp_path, "set", "wait", part=1):
        other = os.fork()
        if other == 0:  # the system's locks are a process's
            lock._held.clear()
            outcomes = []
            for part in (2, 1, None):
                try:
                    with locked(tmp_path, "set", "wait", part):
                        outcomes.append("held")
                except AnotherAtWork:
                    outcomes.append("refused")
            os._exit(0 if outcomes == ["held", "refused", "refused"] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 0
        assert (tmp_path / LOCK).exists()
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_folder_that_stayed_empty(tmp_path: Path) -> None:
    with locked(tmp_path / "new" / "set", "set", "wait"):
        assert [path.name for path in (tmp_path / "new" / "set").iterdir()] == [LOCK]
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "new" / "set", "set", "wait"):
        (tmp_path / "new" / "set" / "file").touch()
    assert [path.name for path in (tmp_path / "new" / "set").iterdir()] == ["file"]


def test_a_disk_that_knows_no_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with locked(tmp_path, "run", "wait"):
        assert "can't be locked ([Errno 37] No locks available): see to it that only one" in caplog.text
