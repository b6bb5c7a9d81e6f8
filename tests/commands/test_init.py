"""The verb `init`: a folder from which the whole road can be gone, and nothing in it overwritten."""

from __future__ import annotations

import filecmp
import tomllib
from pathlib import Path

import pytest

from composer_path.cli import main
from composer_path.commands.init import STARTER, starter_files
from composer_path.config.reading import load_config


def test_the_yamls_are_written_and_can_be_read(tmp_path: Path, repo_root: Path) -> None:
    assert main(["init", str(tmp_path / "new" / "folder")]) == 0
    written = sorted(path for path in (tmp_path / "new" / "folder").rglob("*") if path.is_file())
    assert len(written) == 4
    for path in written:
        assert not path.is_symlink()
        assert filecmp.cmp(path, repo_root / path.relative_to(tmp_path / "new" / "folder"), shallow=False)
    assert load_config(tmp_path / "new" / "folder" / "yamls" / "pretrain.yaml").version == 1


def test_the_demo_has_all_that_its_yamls_and_records_name_with_the_terms(tmp_path: Path, repo_root: Path) -> None:
    assert main(["init", str(tmp_path), "--demo"]) == 0
    assert main(["check", "--files", str(tmp_path / "yamls" / "demo" / "pretrain.yaml")]) in (
        0,
        2,
    )  # shards aren't there
    data = tmp_path / "test_data"
    for name in ("LICENCES.md", "tokenizer/NOTICE", "tokenizer/tokenizer.model", "llama/config.json"):
        assert filecmp.cmp(data / name, repo_root / "test_data" / name, shallow=False)
    names = {path.name for path in (repo_root / "test_data" / "imgs").iterdir()}
    assert names and {path.name for path in (data / "imgs").iterdir()} == names
    for name in ("captions", "data", "heldout_captions", "heldout"):
        assert (data / f"{name}.json").is_file()
    assert not (data / "bad").exists()


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "yamls" / "finetune.yaml"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert main(["init", str(tmp_path), "--demo"]) == 2
    error = capsys.readouterr().err
    assert "nothing is overwritten, found yamls/finetune.yaml; choose another folder" in error
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine] and mine.read_text() == "mine"


def test_a_wheel_takes_the_same_files_by_links_so_that_none_is_kept_twice(repo_root: Path) -> None:
    settings = tomllib.loads((repo_root / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "starter/**/*" in settings["package-data"]["composer_path"]
    for name in starter_files(demo=True):
        assert (STARTER / name).resolve() == repo_root / name
