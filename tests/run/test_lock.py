"""One run a folder: a second one is refused, and a kill leaves the folder free."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from composer_path.run.lock import locked

HOLDS = """
import sys, time
from pathlib import Path
from composer_path.run.lock import locked
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


def test_other_ranks_of_a_run_lock_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with locked(tmp_path / "folder", "run", "wait"):
        assert not (tmp_path / "folder").exists()
