"""The scripts: doors to the command that work from anywhere, also in a clone that isn't installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

DOORS = {"convert": "convert", "view_shards": "shards", "encode": "encode", "measure_lengths": "lengths"}


def run(*words: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Python without what is installed beside it (-S), so also without this package."""
    line = [sys.executable, "-S", *map(str, words)]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin:/bin"})


def test_each_script_has_a_verb(repo_root: Path) -> None:
    assert {path.stem for path in (repo_root / "data_prep").glob("*.py")} == set(DOORS)


@pytest.mark.parametrize(("script", "verb"), DOORS.items())
def test_a_script_is_a_door_to_its_verb(script: str, verb: str, repo_root: Path, tmp_path: Path) -> None:
    path = repo_root / "data_prep" / f"{script}.py"
    words = ["merge"] if verb == "convert" else []  # whose words are read from the conversion's own, which takes numpy
    done = run(path, *words, "--version", folder=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("composer_path "), done.stderr
    assert f'main(["{verb}", *sys.argv[1:]])' in path.read_text() or verb == "convert"
