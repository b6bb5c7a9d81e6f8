"""The verb `ask`: it prints what the assistant says."""

from __future__ import annotations

import io
import json
import shutil
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


def test_a_question_too_many_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", str(folder), "one", "--image", TILE, "two"]) == 2
    assert "found 2 questions; give one, in quotes" in capsys.readouterr().err


def test_a_model_that_takes_no_question_captions_the_images(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def caption(assistant: Assistant, images: list[Any], **generation: Any) -> str:
        print(f"{len(images)} images, {generation['max_new_tokens']} tokens")
        return "a caption"

    monkeypatch.setattr(Assistant, "takes_question", False, raising=False)
    monkeypatch.setattr(Assistant, "caption", caption, raising=False)
    assert ask(capsys, folder, "--image", TILE, "--max-new-tokens", 8) == "1 images, 8 tokens\n"


@pytest.mark.parametrize(
    ("verb", "file", "key", "value"),
    [
        ("ask", "config.json", "language_model", 5),
        ("ask", "config.json", "vision_encoder", {"name": "timm/vit_tiny_patch16_224", "image_size": "large"}),
        ("ask", "config.json", "projector", None),
        ("ask", "processor_config.json", "template", 0),
        ("ask", "processor_config.json", "max_seq_len", {}),
        ("ask", "processor_config.json", "fit", []),
        ("ask", "tokenizer.json", "model", None),
        ("ask", "tokenizer_config.json", "extra_special_tokens", [True]),
        ("ask", "tokenizer_config.json", "model_max_length", "x"),
        ("evaluate", "processor_config.json", "template", 0),
        ("serve", "processor_config.json", "template", 0),
    ],
)
def test_a_damaged_folder_is_one_message(
    verb: str, file: str, key: str, value: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    content = json.loads((model / file).read_text(encoding="utf-8"))
    (model / file).write_text(json.dumps(content | {key: value}), encoding="utf-8")
    more = {"ask": [QUESTION], "serve": ["--port", "0"]}
    more["evaluate"] = ["--data", str(IMAGES.parent / "heldout.json"), "--images", str(IMAGES)]
    assert main([verb, str(model), *more[verb]]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if line.startswith(f"composer-path {verb}: ")]) == 1 and "Traceback" not in said


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"model_type": "llava"}'])
@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer_config.json", "model.safetensors"])
def test_a_file_that_is_none_is_one_message(
    file: str, content: bytes, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    (model / file).write_bytes(content)
    assert main(["ask", str(model), QUESTION]) == 2
    assert capsys.readouterr().err.count("composer-path ask: ") == 1


@pytest.mark.parametrize("temperature", ["inf", "nan", "-1", "1e-320"])
def test_a_temperature_that_nothing_can_be_drawn_with_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], temperature: str
) -> None:
    assert main(["ask", str(folder), QUESTION, f"--temperature={temperature}"]) == 2
    assert "--temperature: must be 0, or from 0.001 to 1000, found" in capsys.readouterr().err


def test_a_later_question_takes_no_image_away_from_the_first(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n<image> Sure?\n\n"))
    assert main(["ask", str(folder), "--chat", "--image", TILE, "--max-new-tokens", "2"]) == 2
    assert "the questions hold 2 image tags and the conversation 1 images" in capsys.readouterr().err
