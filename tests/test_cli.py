"""The command `composer-path`: the road, help that comes at once, and one clear line for every mistake of its user."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_model import IMAGES, tiny_model_folder

from composer_path import __version__
from composer_path.cli import main
from composer_path.commands.verb import ROAD
from composer_path.train import main as train_main

TILE = str(IMAGES / "cmu_x1120_y1960_160.jpg")
QUESTION = "Which stain was used here, H&E or IHC?"
DEMO = IMAGES.parent.parent / "yamls" / "demo" / "pretrain.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.getbasetemp() / "tiny_model")


def test_without_a_verb_the_road_is_printed_a_line_a_verb(capsys: pytest.CaptureFixture[str], repo_root: Path) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == printed
    lines = re.findall(r"^  (\w+) +[A-Z].*\.$", printed, re.MULTILINE)
    assert lines == list(ROAD)
    assert max(map(len, printed.splitlines())) <= 110
    modules = {path.stem for path in (repo_root / "composer_path" / "commands").glob("*.py")}
    assert modules == {*ROAD, "verb", "__init__"}


def test_a_verb_that_is_not_there_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "composer-path: there is no verb 'trian'; did you mean train?\n"
    assert main(["xyz"]) == 2
    assert "choose one of init, census, convert" in capsys.readouterr().err


def test_help_of_every_verb_and_the_version_come_without_the_training_libraries() -> None:
    code = f"""
import sys
from composer_path.cli import main
for words in ([], ["--version"], *([verb, "--help"] for verb in {list(ROAD)})):
    try:
        main(words)
    except SystemExit as ending:
        assert ending.code == 0, words
import composer_path.asking.run_table
sys.exit(str([name for name in ("torch", "transformers", "streaming", "composer") if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
    assert done.stdout.count("usage: composer-path") == 1 + len(ROAD)


def test_training_is_the_same_command_by_each_of_its_names(
    capsys: pytest.CaptureFixture[str], repo_root: Path, tmp_path: Path
) -> None:
    mistake = [str(DEMO), "--check", "optimizer.lrr=1"]
    assert main(["train", *mistake]) == train_main(mistake) == main(["check", mistake[0], mistake[2]]) == 2
    by_cli, by_function, by_check = re.split(r"(?<=lr\?\n)(?=c)", capsys.readouterr().err)
    assert by_cli == by_function == by_check.replace("check", "train", 1)
    for name in ([str(repo_root / "train.py")], ["-m", "composer_path.train"], ["-m", "composer_path.cli", "train"]):
        done = subprocess.run([sys.executable, *name, "--version"], capture_output=True, text=True, cwd=repo_root)
        assert (done.returncode, done.stdout) == (0, f"composer_path {__version__}\n"), done.stderr


def test_check_says_whether_it_looked_for_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [str(DEMO), f"variables.shards={tmp_path}"]
    assert main(["check", *words]) == 0
    assert capsys.readouterr().out == f"{DEMO}: no mistake found; files were not looked for (--files does)\n"
    assert main(["check", "--files", *words]) == 2
    assert "train_loader.dataset.local: found no index.json in" in capsys.readouterr().err


def test_each_mistake_is_one_line_and_exit_code_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no picture, no records")
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes(b"cut off")
    heldout = tmp_path / "heldout.json"
    heldout.write_text(json.dumps([{"conversations": [{"from": "human", "value": "a"}]}]))
    mistakes: dict[str, list[Any]] = {
        "processor_config.json": ["ask", tmp_path, "--image", TILE, QUESTION],
        "give a question, or --chat": ["ask", folder],
        "give a question, or --chat to": ["ask", folder, " "],
        "takes a question; give one": ["ask", folder, "--image", TILE],
        "--temperature: must be 0, or from 0.001 to 1000, found -1.0": ["ask", folder, QUESTION, "--temperature", "-1"],
        "notes.txt': an image must decode": ["ask", folder, "--image", text, QUESTION],
        "none.jpg': there is no such file": ["ask", folder, "--image", "none.jpg", QUESTION],
        "1 image tags and the conversation 2 images": [
            "ask",
            folder,
            "--image",
            TILE,
            "--image",
            TILE,
            "<image> What?",
        ],
        "model.safetensors": ["ask", broken, "--image", TILE, QUESTION],
        "no run configuration at": ["export", text, tmp_path / "out"],
        "notes.txt/yamls/demo: Not a directory": ["init", text],
        "unknown key; did you mean optimizer.lr?": ["plan", DEMO, "--gpus", "8", "optimizer.lrr=1"],
        "none.yaml: 1 problem": ["check", "none.yaml"],
        "must hold index.json, found none": ["shards", tmp_path, "summary"],
        "--images nowhere: there is no such folder": [
            "evaluate",
            folder,
            "--data",
            heldout_file(),
            "--images",
            "nowhere",
        ],
        "none.json": ["evaluate", folder, "--data", tmp_path / "none.json", "--images", IMAGES],
        "record 0: conversations: at least one turn must be": [
            "evaluate",
            folder,
            "--data",
            heldout,
            "--images",
            IMAGES,
        ],
        "no closed question": ["evaluate", folder, "--data", captions_file(), "--images", IMAGES],
        "no summary.json in a folder below": ["summary", tmp_path],
    }
    for expected, arguments in mistakes.items():
        assert main([str(argument) for argument in arguments]) == 2, expected
        shown = capsys.readouterr()
        assert expected in shown.err and shown.err.count("\n") == 1 + (arguments[0] in ("plan", "check")), shown.err
        assert shown.err.startswith(f"composer-path {arguments[0]}: ")


def heldout_file() -> Path:
    return IMAGES.parent / "heldout.json"


def captions_file() -> Path:
    return IMAGES.parent / "heldout_captions.json"
