"""The verb `export`: which checkpoint is meant, and clear words where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from composer_path.cli import main
from composer_path.commands.export import find_checkpoint


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run's folder with one sharded checkpoint."""
    folder = tmp_path / "finetune"
    (folder / "checkpoints" / "ep1-ba20").mkdir(parents=True)
    (folder / "checkpoints" / "latest-rank0.pt").symlink_to("ep1-ba20")
    (folder / "config.yaml").write_text("version: 1\n")
    return folder


def test_a_run_means_its_newest_checkpoint(run_folder: Path) -> None:
    newest = run_folder / "checkpoints" / "latest-rank0.pt"
    assert find_checkpoint(run_folder) == (newest, run_folder / "config.yaml")
    assert find_checkpoint(newest) == (newest, run_folder / "config.yaml")
    older = run_folder / "checkpoints" / "ep1-ba20"
    assert find_checkpoint(older) == (older, run_folder / "config.yaml")


def test_a_run_without_a_checkpoint_is_told_so(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_folder / "checkpoints" / "ep1-ba20").rmdir()
    for _ in range(2):  # a link that leads nowhere, and none
        assert main(["export", str(run_folder), str(run_folder / "out")]) == 2
        assert f"run '{run_folder}': found no checkpoint at" in capsys.readouterr().err
        (run_folder / "checkpoints" / "latest-rank0.pt").unlink(missing_ok=True)
    assert not (run_folder / "out").exists()


def test_what_is_neither_is_told_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "a" / "b"), str(tmp_path / "out")]) == 2
    assert (
        "give a run's folder or a checkpoint in it, or name its configuration with --config" in capsys.readouterr().err
    )
