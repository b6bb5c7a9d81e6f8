"""Every benchmark's quick run goes through all of its lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXPECTED = {
    "step_speed": "frozen language model",
    "end_to_end": "ours is faster by",
    "host_work": "ours over transformers",
    "scaling": "KB a token",
    "examining_speed": "own process : this one",
    "learning": "loops_range_between_seeds",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_a_quick_run_ends_well_and_leaves_the_results_alone(name: str, repo_root: Path) -> None:
    results = repo_root / "benchmarks" / "results"
    before = {path: path.stat().st_mtime_ns for path in results.glob(f"{name}*")}
    process = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick"],
        cwd=repo_root,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert EXPECTED[name] in process.stdout
    assert {path: path.stat().st_mtime_ns for path in results.glob(f"{name}*")} == before


@pytest.mark.slow
def test_the_gpu_benchmark_goes_through_every_line_on_a_cpu(tmp_path: Path, repo_root: Path) -> None:
    words = ["--tiny", "--results", str(tmp_path / "results"), "--scratch", str(tmp_path), "--minutes", "14"]
    process = subprocess.run(
        [repo_root / "benchmarks" / "gpu.sh", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads((tmp_path / "results" / "gpu.json").read_text())["jobs"]
    assert len(found) == 17
    not_run = {name for name, report in found.items() if "not_run" in report}
    assert {name.partition(": ")[2] for name in not_run} == {"liger", "compile"} and len(not_run) == 6
