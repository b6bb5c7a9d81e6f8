"""The verbs `convert` and `merge`: exit codes, and what they print."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from composer_path.cli import main
from composer_path.shards.index import held
from composer_path.storage.places import Folder

SECRET = "Miller-Jane-4711"


def convert(*words: str) -> int:
    """The exit code; argparse's too."""
    try:
        return main(["convert", *words])
    except SystemExit as ending:
        return int(str(ending.code))


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Arguments for a data set of one good and one bad record, both about a patient with a name."""
    (tmp_path / "imgs").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "imgs" / f"{SECRET}.png")

    def record(name: str) -> dict[str, Any]:
        turns = [{"from": "human", "value": f"Is this {SECRET}?"}, {"from": "gpt", "value": f"{SECRET}, yes."}]
        return {"id": name, "patient": SECRET, "image": f"{name}.png", "conversations": turns, "extra": SECRET}

    (tmp_path / "data.json").write_text(json.dumps([record(SECRET), record(f"{SECRET}-2")]))
    paths = {"--data": "data.json", "--images": "imgs", "--out": "out"}
    return [word for option, name in paths.items() for word in (option, str(tmp_path / name))]


def test_a_bad_record_fails_the_command_without_a_word_of_the_patient(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert convert(*arguments) == 1
    output = capfd.readouterr()
    assert output.out == ""
    assert "record 1: image 1 of 1" in output.err
    assert "[missing-file]" in output.err
    assert SECRET not in output.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "identifiers.key", "imgs"]


def test_skip_prints_a_summary_without_a_word_of_the_patient(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert convert(*arguments, "--on-error", "skip") == 0
    output = capfd.readouterr()
    assert SECRET not in output.out + output.err
    table = {line[:36].strip(): line[36:] for line in output.out.splitlines()}
    assert (table["records"], table["records rejected"], table["missing-file"]) == ("1", "1", "1")
    assert (table["records with one image and no tag"], table["shards"]) == ("1", "1")
    assert table["ignored key extra"] == "in 2 records"
    assert table["rejected records listed in"] == str(tmp_path / "rejected.jsonl")
    assert (tmp_path / "out" / "index.json").exists()


def test_every_option_reaches_the_conversion(arguments: list[str], tmp_path: Path) -> None:
    options = {"--on-error": "skip", "--ids": "keep", "--size-limit": "10kb", "--max-pixels": "64", "--check": "header"}
    options |= {"--resize": "8", "--pad-color": "1,2,3", "--workers": "1", "--partition-size": "1"}
    options |= {"--duplicate-ids": "keep", "--image-tags": "read"}
    files = {"--rejected": str(tmp_path / "r.jsonl"), "--key": str(tmp_path / "k.key")}
    words = [word for option in {**options, **files}.items() for word in option]
    assert convert(*arguments, *words) == 0
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    resized = {"image_size": 8, "fit": "pad", "pad_color": [1, 2, 3]}
    assert info["resized"] == info["options"].pop("resized") == resized
    expected = {"ids": "keep", "size_limit": "10kb", "hashes": ["xxh64"], "max_pixels": 64, "check": "header"}
    expected |= {"duplicate_ids": "keep", "image_tags": "read", "scale_levels": False}
    assert info["options"] == {**expected, "on_error": "skip", "partition_size": 1}
    assert (tmp_path / "r.jsonl").exists()
    assert not (tmp_path / "k.key").exists()  # identifiers that are kept need no key
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["shards"][0]["size_limit"] == 10 * 1024


def test_a_place_that_cannot_be_written_ends_in_one_line(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments[-1] = str(tmp_path / "data.json" / "out")
    assert convert(*arguments, "--on-error", "skip") == 1
    assert "Traceback" not in capfd.readouterr().err


def test_a_second_command_into_one_place_ends_in_one_line(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with held(Folder(tmp_path / "out")):
        assert convert(*arguments, "--overwrite") == 1
        assert main(["merge", str(tmp_path / "out")]) == 1
    first, second = capfd.readouterr().err.splitlines()
    assert first == second
    assert "one conversion at a time, found another one at work (in this process); wait for it, or choose" in first


def test_wrong_arguments_end_with_status_2(arguments: list[str]) -> None:
    for wrong in (
        [],
        [*arguments, "--ids", "none"],
        [*arguments, "--compress"],
        [*arguments, "--max-pixels", "x"],
        [*arguments, "--size-limit", "64"],
        [*arguments, "--part", "3/2"],
        [*arguments, "--resume", "--overwrite"],
        [*arguments, "--pad-color", "1,2"],
        [*arguments, "--pad-color", "1,2,256"],
    ):
        assert convert(*wrong) == 2


def test_parts_are_joined_by_merge(arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [*arguments, "--on-error", "skip", "--partition-size", "1", "--workers", "1"]
    assert convert(*words, "--part", "1/2") == 0
    assert "composer-path merge OUT" in capfd.readouterr().out
    assert main(["merge", arguments[-1]]) == 1
    assert "2/2 (1 partitions)" in capfd.readouterr().err
    assert not (tmp_path / "out" / "index.json").exists()
    assert convert(*words, "--part", "2/2") == 0
    assert main(["merge", arguments[-1]]) == 0
    assert (tmp_path / "out" / "index.json").exists()


def test_a_full_disk_is_named_and_the_command_goes_on(repo_root: Path, tmp_path: Path) -> None:
    words = ["--data", "test_data/captions.json", "--images", "test_data/imgs", "--key", str(tmp_path / "key")]
    command = [sys.executable, "data_prep/convert.py", *words, "--out", str(tmp_path / "out"), "--workers", "1"]

    def no_large_file() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    full = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, preexec_fn=no_large_file)
    assert full.returncode == 1
    assert full.stderr.startswith(f"{tmp_path / 'out'}: File too large; nothing was published.")
    assert len(full.stderr.splitlines()) == 1
    assert not (tmp_path / "out" / "index.json").exists()
    assert not list(tmp_path.rglob("*.unfinished"))
    subprocess.run([*command, "--resume"], cwd=repo_root, check=True, capture_output=True)
    assert (tmp_path / "out" / "index.json").exists()
