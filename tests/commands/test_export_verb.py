"""The verb `export`: which checkpoint is meant, and clear words where there is none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fake_checkpoints import fake_checkpoint

from composer_path.checkpoints.folder import CheckpointFolder
from composer_path.cli import main
from composer_path.commands.export import find_checkpoint


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run's folder with two checkpoints."""
    folder = tmp_path / "finetune"
    for step in (10, 20):
        fake_checkpoint(CheckpointFolder(folder / "checkpoints"), step)
    (folder / "config.yaml").write_text("version: 1\n")
    return folder


def test_a_run_means_its_newest_whole_checkpoint(run_folder: Path) -> None:
    newest = run_folder / "checkpoints" / "ep0-ba20"
    assert find_checkpoint(run_folder) == (newest, run_folder / "config.yaml")
    for place in (run_folder / "checkpoints" / "latest", run_folder / "checkpoints" / "ep0-ba10"):
        assert find_checkpoint(place) == (place, run_folder / "config.yaml")
    (newest / "__0_0.distcp").write_bytes(b"damaged")
    assert find_checkpoint(run_folder)[0].name == "ep0-ba10"


def test_a_run_without_a_checkpoint_is_told_so(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (10, 20):
        shutil.rmtree(run_folder / "checkpoints" / f"ep0-ba{step}")
    for _ in range(2):  # a link that leads nowhere, and none
        assert main(["export", str(run_folder), str(run_folder / "out")]) == 2
        assert f"run '{run_folder}': found no checkpoint in" in capsys.readouterr().err
        (run_folder / "checkpoints" / "latest").unlink(missing_ok=True)
    assert not (run_folder / "out").exists()


def test_what_is_neither_is_told_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "a" / "b"), str(tmp_path / "out")]) == 2
    assert (
        "give a run's folder or a checkpoint in it, or name its configuration with --config" in capsys.readouterr().err
    )


def test_what_is_written_lies_on_this_disk(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run_folder), "s3://bucket/out"]) == 2
    assert "OUT: must be a folder on this disk, found 's3://bucket/out'" in capsys.readouterr().err
