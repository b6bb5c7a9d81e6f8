"""Environments of other programs beside the one that runs the tests, and what they need to know of this package."""

from __future__ import annotations

import os
import subprocess
import tomllib
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parent.parent


def python_of(variable: str, module: str) -> str:
    """The Python that an environment variable names and that has a module; the test is skipped where there is none."""
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"set {variable} to the Python of an environment with {module}; see docs/harnesses.md")
    found = subprocess.run([python, "-c", f"import torchvision, {module}"], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"{variable}: {module} can't be imported there: {found.stderr.strip().splitlines()[-1][:200]}")
    return python


def installed_here(folder: Path) -> dict[str, str]:
    """An environment's variables in which this package counts as installed, with its entry points."""
    project = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    metadata = folder / "composer_path-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: composer-path\nVersion: 0\n", encoding="utf-8")
    groups = project.get("entry-points", {})
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in groups.items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    kept = ("PATH", "HOME", "TMPDIR", "LANG", "OMP_NUM_THREADS")
    ours = {"PYTHONPATH": f"{folder}{os.pathsep}{REPO_ROOT}", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {name: os.environ[name] for name in kept if name in os.environ} | ours


def run_there(python: str, arguments: list[str], folder: Path, timeout: float = 1500, **more: str) -> str:
    """Run a command of another environment in a folder; what it wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    variables = installed_here(folder / "installed") | more
    done = subprocess.run(
        [python, *arguments], cwd=folder, env=variables, capture_output=True, text=True, timeout=timeout, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    return said
