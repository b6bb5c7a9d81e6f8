"""What tests of configurations share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _in_repo_root(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo_root)


@pytest.fixture
def demo(repo_root: Path) -> Path:
    return repo_root / "yamls" / "demo" / "pretrain.yaml"
