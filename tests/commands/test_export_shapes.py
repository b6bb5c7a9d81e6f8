"""`export --as`: from a run and from an exported folder, to the same; and mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_model import tiny_model_folder
from tiny_run import road

from composer_path.cli import main
from composer_path.commands.export import SHAPES
from composer_path.handing_on.shapes import SHAPES as WRITERS


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return road(tmp_path_factory.getbasetemp() / "road")


def test_the_verb_knows_the_shapes_that_there_are() -> None:
    assert SHAPES.keys() == WRITERS.keys()


def test_a_run_and_what_it_exported_are_handed_on_as_one_model(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(runs / "finetune"), str(tmp_path / "a"), "--as", "language-model"]) == 0
    assert capsys.readouterr().out == f"language-model: {tmp_path / 'a'}\n"
    model = runs / "finetune" / "model"
    assert main(["export", str(model), str(tmp_path / "b"), "--as", "language-model"]) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    # An exported folder's vocabulary has a token for images, as the last.
    assert all((first[key] == second[key][: len(first[key])]).all() for key in first)
    longer = {key for key in first if len(second[key]) == len(first[key]) + 1}
    assert longer == {"lm_head.weight", "model.embed_tokens.weight"}
    assert main(["compare", str(tmp_path / "b"), str(tmp_path / "b")]) == 0
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert main(["export", str(model), str(tmp_path / "p"), "--as", "projector"]) == 0
    alone = tmp_path / "p" / "projector.safetensors"
    assert main(["compare", str(alone), str(tmp_path / "a" / "model.safetensors")]) == 1


def test_mistakes_are_a_line_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = str(tiny_model_folder(tmp_path / "model")), tmp_path / "out"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model.safetensors").write_bytes(b"theirs")
    (tmp_path / "file").write_text("")
    mistakes = {
        "a stock LLaVA can't have the projector": [model, str(out), "--as", "llava-hf"],
        "no place for: vision encoder": [model, str(out), "--as", "reference"],
        "an exported folder's are merged": [model, str(out), "--as", "peft"],
        "--config: is of a run": [model, str(out), "--as", "onnx", "--config", "run.yaml"],
        "a graph is written in fp32": [model, str(out), "--as", "onnx", "--dtype", "bf16"],
        "found model.safetensors; choose another place": [model, str(tmp_path / "theirs"), "--as", "language-model"],
        "found a file; choose another place": [model, str(tmp_path / "file"), "--as", "language-model"],
    }
    for words, arguments in mistakes.items():
        assert main(["export", *arguments]) == 2, words
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1, said
        assert not out.exists()
    assert (tmp_path / "theirs" / "model.safetensors").read_bytes() == b"theirs"


def test_a_damaged_list_of_what_was_written_is_no_leave_to_remove_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = str(tiny_model_folder(tmp_path / "model")), tmp_path / "out"
    out.mkdir()
    (tmp_path / "outside.txt").write_text("theirs")
    (out / "sub").mkdir()
    (out / "sub" / "inner.txt").write_text("theirs")
    said = {"files": ["../outside.txt", "sub", "sub/inner.txt", str(tmp_path / "outside.txt")]}
    (out / "composer_path.json").write_text(json.dumps(said))
    assert main(["export", model, str(out), "--as", "projector"]) == 0
    assert (tmp_path / "outside.txt").exists() and (out / "sub" / "inner.txt").exists()
    for content in ("{", "[]", '{"files": 3}', '{"files": [3]}'):
        (out / "composer_path.json").write_text(content)
        assert main(["export", model, str(out), "--as", "projector"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
