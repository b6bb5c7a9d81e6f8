"""The command `composer-path`: what it prints, and one clear line for every mistake of its user."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_model import IMAGES, tiny_model_folder

from composer_path.asking.assistant import Assistant
from composer_path.cli import main

TILE = str(IMAGES / "cmu_x1120_y1960_160.jpg")
OTHER_TILE = str(IMAGES / "ihc_x0264_y0352_160.jpg")
QUESTION = "Which stain was used here, H&E or IHC?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.getbasetemp() / "tiny_model")


@pytest.fixture(scope="module")
def assistant(folder: Path) -> Assistant:
    return Assistant.from_pretrained(folder)


def words(text: str) -> str:
    """Streamed and decoded at once, a text may differ in white space only."""
    return "".join(text.split())


def ask(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main(["ask", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_ask_prints_the_answer(folder: Path, assistant: Assistant, capsys: pytest.CaptureFixture[str]) -> None:
    said = ask(capsys, folder, "--image", TILE, "--max-new-tokens", 8, QUESTION)
    expected = assistant.answer([("human", QUESTION)], [assistant.read_image(TILE)], max_new_tokens=8)
    assert words(said) == words(expected) and expected


def test_ask_shows_several_images_in_their_order(
    folder: Path, assistant: Assistant, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ask(capsys, folder, QUESTION, "--image", TILE, "--image", OTHER_TILE, "--max-new-tokens", 8)
    images = [assistant.read_image(TILE), assistant.read_image(OTHER_TILE)]
    assert words(said) == words(assistant.answer([("human", QUESTION)], images, max_new_tokens=8))


def test_chat_remembers_what_was_said_and_ends_at_an_empty_line(
    folder: Path, assistant: Assistant, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\nSure?\n\nnever asked\n"))
    said = ask(capsys, folder, "--chat", "--image", TILE, "--max-new-tokens", 6)
    images = [assistant.read_image(TILE)]
    first = assistant.answer([("human", QUESTION)], images, max_new_tokens=6)
    turns = [("human", QUESTION), ("assistant", first), ("human", "Sure?")]
    second = assistant.answer(turns, images, max_new_tokens=6)
    assert words(said) == words(f"> {first} > {second} >")


def test_sampling_can_be_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (folder, "--image", TILE, "--max-new-tokens", 8, "--temperature", 5.0, QUESTION)
    assert len({ask(capsys, *arguments) for _ in range(3)}) > 1


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
        "give a question, or --chat": ["ask", folder, "--image", TILE],
        "give a question, or --chat to": ["ask", folder, "--image", TILE, " "],
        "notes.txt': unreadable-image": ["ask", folder, "--image", text, QUESTION],
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
        assert expected in shown.err and shown.err.count("\n") == 1, shown.err
        assert shown.err.startswith(f"composer-path {arguments[0]}: ")


def test_a_question_too_many_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["ask", str(folder), "--image", TILE, "one", "two"])
    assert stopped.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_evaluate_prints_a_table_and_leaves_it_beside_the_model_for_summary(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "exported"
    shutil.copytree(folder, model)
    records = json.loads(heldout_file().read_text(encoding="utf-8"))
    closed = [record for record in records if "options" in record["meta"]][:6]
    data = tmp_path / "closed.json"
    data.write_text(json.dumps(closed), encoding="utf-8")
    assert main(["evaluate", str(model), "--data", str(data), "--images", str(IMAGES)]) == 0
    table = capsys.readouterr().out
    left = json.loads((model / "evaluation.json").read_text())
    assert left["all"]["asked"] == 6 and set(left["kinds"]) == {record["meta"]["kind"] for record in closed}
    (tmp_path / "pretrain").mkdir()
    summary = {"run": "pretrain", "steps": 2, "samples_per_second": 1.0, "tokens_per_second": 9.0}
    (tmp_path / "pretrain" / "summary.json").write_text(json.dumps(summary | {"heldout_token_loss": {}}))
    assert main(["summary", str(tmp_path)]) == 0
    assert table.strip() in capsys.readouterr().out


def test_help_and_summary_come_at_once_without_torch() -> None:
    code = "import sys, composer_path.cli, composer_path.asking.run_table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def heldout_file() -> Path:
    return IMAGES.parent / "heldout.json"


def captions_file() -> Path:
    return IMAGES.parent / "heldout_captions.json"
