"""The verb `serve`: where it may be bound, what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="serving needs the extra 'serve'")

from tiny_model import tiny_model_folder

from composer_path.cli import main
from composer_path.commands import serve

KEY = "correct-horse-battery"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.getbasetemp() / "tiny_model")


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert main(["serve", *map(str, words)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_it_prints_where_it_is_answers_there_and_ends_with_ctrl_c(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY + "\n")
    command = [sys.executable, "-m", "composer_path.cli", "serve", str(folder), "--port", "0", "--name", "mine"]
    command += ["--api-key-file", str(tmp_path / "key")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"serving 'mine' at (http://127\.0\.0\.1:\d+) \(a page to ask; .* Ctrl-C ends\n", line)
        assert found, line
        asked = urllib.request.Request(f"{found[1]}/v1/models", headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(asked) as answer:
            assert json.load(answer)["data"][0]["id"] == "mine"
        with urllib.request.urlopen(found[1]) as answer:
            assert b"<!doctype html>" in answer.read()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0 and out == "ended\n"
    assert "Traceback" not in err and KEY not in err + line


def test_other_machines_are_served_with_a_key_only(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "so that a key is needed; give --api-key-file" in refused(capsys, folder, "--host", "0.0.0.0", "--port", 0)
    for text in ("", "short", f"{KEY} {KEY}", f"{KEY}\n{KEY}", "\u00e4" * 20, "\0" * 20):
        (tmp_path / "key").write_text(text)
        said = refused(capsys, folder, "--api-key-file", tmp_path / "key")
        assert "must hold one word of 16 letters or more" in said and KEY not in said
    (tmp_path / "key").write_bytes(b"\xff" * 20)
    assert "must hold one word" in refused(capsys, folder, "--api-key-file", tmp_path / "key")
    assert "No such file" in refused(capsys, folder, "--api-key-file", tmp_path / "none")


def test_a_place_that_can_not_be_had_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from composer_path.serving.server import listen

    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port}: can't be listened on" in refused(capsys, folder, "--port", port)
    assert "--host: must be" in refused(capsys, folder, "--host", "no.such.name.invalid", "--port", 0)
    assert "--host: must be" in refused(capsys, folder, "--host", "a" * 300, "--port", 0)
    assert "--allow-origin: must be like" in refused(capsys, folder, "--allow-origin", "*")


def test_a_folder_that_is_no_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give the folder that composer-path export wrote" in refused(capsys, tmp_path, "--port", 0)


def test_what_is_lacking_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else name)
    assert "serve needs the package uvicorn; pip install 'composer_path[serve]'" in refused(capsys, folder)


@pytest.mark.parametrize(
    "words", [("--port", "65536"), ("--port", "x"), ("--max-image-bytes", "16"), ("--max-batch", "0")]
)
def test_numbers_that_are_none_are_mistakes(
    folder: Path, words: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        main(["serve", str(folder), *words])
    assert ending.value.code == 2 and capsys.readouterr().err.count("\n") == 1
