"""A run or an export that meets an attacked checkpoint ends with 2 and one message; what was planted never runs."""

from __future__ import annotations

import io
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from attacks import PICKLES, write_zip
from tiny_run import BARE, REPO_ROOT, Interrupted, Witness, convert_shards, load_tiny_config, run, tiny_overrides
from torch.distributed.checkpoint import FileSystemReader
from warm_process import popen

from composer_path.checkpoints.folder import CheckpointFolder
from composer_path.checkpoints.manifest import MANIFEST
from composer_path.cli import main
from composer_path.storage.places import Folder

SAVING = [*BARE[:1], "algorithms=null", "callbacks=null", "trainer.save_interval=1ba", "trainer.max_duration=3ba"]
NAME = "ep0-ba1"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_shards(tmp_path_factory.getbasetemp() / "road" / "shards")


@pytest.fixture(scope="module")
def stopped(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its first step, with the checkpoint of that step."""
    root = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Interrupted):
        run(load_tiny_config("pretrain", shards, root, SAVING), Witness(stop_after=1))
    assert (root / "pretrain" / "checkpoints" / NAME / MANIFEST).is_file()
    return root


def plant_in_metadata(checkpoint: Path, pickled: bytes) -> None:
    (checkpoint / ".metadata").write_bytes(pickled)


def plant_in_entries(checkpoint: Path, pickled: bytes) -> None:
    """In every value and tensor of the model."""
    buffer = io.BytesIO()
    write_zip(buffer, pickled)
    metadata = FileSystemReader(checkpoint).read_metadata()
    for index, info in metadata.storage_data.items():
        if "state.model" in index.fqn or "timestamp" in index.fqn:
            path = checkpoint / info.relative_path
            info.offset, info.length = path.stat().st_size, len(buffer.getvalue())
            with path.open("ab") as file:
                file.write(buffer.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def plant_single_file(checkpoint: Path, pickled: bytes) -> None:
    """As an earlier version wrote it."""
    shutil.rmtree(checkpoint)
    write_zip(checkpoint.parent / f"{NAME}-rank0.pt", pickled)


def fit_manifest(checkpoint: Path) -> None:
    """Who can write a checkpoint can write a manifest that fits."""
    manifest = CheckpointFolder(checkpoint.parent).manifest(checkpoint.name)
    assert manifest is not None
    found = {name: Folder(checkpoint).digest(name) for name in manifest.files}
    files = {name: ((checkpoint / name).stat().st_size, digest) for name, (_, digest) in found.items()}
    (checkpoint / MANIFEST).write_bytes(replace(manifest, files=files).to_bytes())


PLANTS = {"metadata": plant_in_metadata, "entries": plant_in_entries, "single file": plant_single_file}


@pytest.mark.parametrize("attack", ["BUILD of a class by slots", "BUILD of a function"])
@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS)
def test_nothing_runs_by_resuming_loading_or_exporting(
    plant: Callable[[Path, bytes], None],
    attack: str,
    stopped: Path,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    shutil.copytree(stopped, tmp_path / "root", symlinks=True)
    marker, folder = tmp_path / "ran", tmp_path / "root" / "pretrain" / "checkpoints"
    plant(folder / NAME, PICKLES[attack](marker))
    planted = folder / NAME
    if planted.is_dir():
        fit_manifest(planted)
    else:
        planted = folder / f"{NAME}-rank0.pt"
    yaml = str(REPO_ROOT / "yamls" / "demo" / "pretrain.yaml")
    overrides = [*tiny_overrides("pretrain", shards, tmp_path / "root"), *SAVING]
    anew = ["trainer.run_name=another", "trainer.autoresume=false", f"trainer.load_path={planted}"]
    for words in (
        ["train", yaml, *overrides],
        ["train", yaml, *overrides, *anew],
        ["export", str(planted), str(tmp_path / "out"), "--config", str(folder.parent / "config.yaml")],
    ):
        capsys.readouterr()
        assert main(words) == 2, words[0]
        said = capsys.readouterr().err
        assert "Traceback" not in said and said.count("found ") == 1, said
        assert said.splitlines()[-1].startswith(f"composer-path {words[0]}: ")
        assert not marker.exists()
    assert planted.exists()


def test_the_command_says_it_too(shards: Path, tmp_path: Path) -> None:
    marker, planted = tmp_path / "ran", tmp_path / "checkpoint.pt"
    write_zip(planted, PICKLES["a file in the pickle"](marker))
    words = [sys.executable, str(REPO_ROOT / "train.py"), str(REPO_ROOT / "yamls" / "demo" / "pretrain.yaml")]
    words += [*tiny_overrides("pretrain", shards, tmp_path), *SAVING, f"trainer.load_path={planted}"]
    process = popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = process.communicate()[1]
    assert process.returncode == 2 and "found the name 'torch.storage._load_from_bytes'; take another" in said, said
    assert "Traceback" not in said and not marker.exists()
