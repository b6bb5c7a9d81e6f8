"""A self-contained folder is loaded by who has transformers, torch and timm only, and says what `ask` says."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import IMAGES, tiny_model_folder

from composer_path import PathMLLM
from composer_path.asking.assistant import Assistant
from composer_path.cli import main
from composer_path.hugging_face.carried_code import LICENSE, add_code, code
from composer_path.hugging_face.model_config import MODEL_TYPE
from composer_path.records.conversation import Turn
from composer_path.records.tokenize import IMAGE_TOKEN_ID
from composer_path.run.published import publish

PICTURE, QUESTION = sorted(IMAGES.iterdir())[0], "What organ is this?"
# What a folder's code may import before anything is asked of it.
NEEDED = {"PIL", "numpy", "timm", "torch", "transformers"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.getbasetemp() / "tiny_model")


@pytest.fixture(scope="module")
def folder(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("carrying") / "model"
    shutil.copytree(plain, place)
    add_code(place)
    return place


def test_who_lacks_this_package_gets_the_ids_logits_and_answers_of_ask(folder: Path, tmp_path: Path) -> None:
    """Also through `pipeline`, and again from what transformers saves of it, which we read in turn."""
    assistant = Assistant.from_pretrained(folder, device="cpu")
    picture = assistant.read_image(PICTURE)
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    script = Path(__file__).with_name("stranger.py")
    words = [sys.executable, "-W", "ignore", script, folder, PICTURE, QUESTION, tmp_path]
    done = subprocess.run(list(map(str, words)), env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["lacking"] == [] and found["module"].startswith("transformers_modules.")

    prompt = assistant.prompt([Turn("human", QUESTION)], [picture])
    token = assistant.model.image_token_id
    ids = [token if id == IMAGE_TOKEN_ID else id for id in prompt.input_ids.tolist()]
    answer = assistant.answer([("human", QUESTION)], [picture], max_new_tokens=8)
    new = assistant.model.generate(
        prompt.input_ids, picture[None], max_new_tokens=8, eos_token_id=assistant.end_ids(), suppress_tokens=[token]
    )
    with torch.no_grad():
        embeds = assistant.features.embedded([prompt])[0][None]
        logits = assistant.model.language_model(inputs_embeds=embeds).logits[0, -1]
    for said in (found["first"], found["again"]):
        assert said["ids"] == ids and said["new"] == new.tolist()
        torch.testing.assert_close(torch.tensor(said["logits"]), logits, atol=1e-5, rtol=1e-5)
    assert found["pipeline"] == answer and found["num_image_tokens"] == assistant.model.num_image_tokens()

    saved = tmp_path / "saved"
    before, after = (load_file(place / "model.safetensors") for place in (folder, saved))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert (
        Assistant.from_pretrained(saved, device="cpu").answer([("human", QUESTION)], [picture], max_new_tokens=8)
        == answer
    )


def test_our_reader_takes_the_folder_and_runs_nothing_of_it(folder: Path, plain: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    shutil.copytree(folder, place)
    for file in place.glob("*.py"):
        file.write_text("raise SystemExit('it was run')")
    ours, without = PathMLLM.from_pretrained(place).state_dict(), PathMLLM.from_pretrained(plain).state_dict()
    assert ours.keys() == without.keys() and all(torch.equal(ours[key], without[key]) for key in ours)
    again = Assistant.from_pretrained(place, device="cpu")
    assert again.text == Assistant.from_pretrained(plain, device="cpu").text


def test_the_files_import_one_another_and_what_a_folder_may_need() -> None:
    """None in a circle, as transformers 4 would follow it for ever."""
    below: dict[str, set[str]] = {}
    for name, text in code().items():
        tree = ast.parse(text)
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        relative = [node for node in top if isinstance(node, ast.ImportFrom) and node.level]
        below[name] = {f"{node.module or alias.name}.py" for node in relative for alias in node.names}
        foreign = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        foreign |= {str(node.module) for node in top if isinstance(node, ast.ImportFrom) and not node.level}
        packages = {one.partition(".")[0] for one in foreign} - sys.stdlib_module_names
        assert packages <= NEEDED, (name, packages - NEEDED)
        assert "composer_path." not in "".join(map(ast.unparse, top)), name
    assert all(others <= code().keys() for others in below.values())
    while below:
        free = {name for name, others in below.items() if not others & below.keys()}
        assert free, f"in a circle: {sorted(below)}"
        below = {name: others for name, others in below.items() if name not in free}


def test_what_only_training_needs_is_left_behind() -> None:
    text = "".join(code().values())
    assert "def untrained_vision_encoder" in text and "def examine_image" in text
    for name in ("def save_tokenizer", "def read_tensor_file", "class PathMLLM", "subprocess", ".register("):
        assert name not in text, name


def test_another_export_takes_the_code_away(folder: Path, plain: Path, tmp_path: Path) -> None:
    out, notes = tmp_path / "out", tmp_path / "out" / "my_notes.py"
    for source, more in ((folder, {*code(), LICENSE}), (plain, set())):
        publish(out, MODEL_TYPE, lambda new, source=source: shutil.copytree(source, new, dirs_exist_ok=True))
        notes.touch()
        assert {path.name for path in out.iterdir()} >= more
    assert not {path.name for path in out.iterdir()} & {*code(), LICENSE} and notes.exists()
    assert "Apache License" in (folder / LICENSE).read_text()


def test_parts_of_ones_own_are_refused_by_name(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "model")
    file = tmp_path / "model" / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"imports": ["my_templates"]}))
    with pytest.raises(ValueError, match=r"--self-contained: .* processor_config.json needs \['my_templates'\]"):
        add_code(tmp_path / "model")
    assert not list((tmp_path / "model").glob("*.py"))


def test_another_shape_has_no_code_of_ours(capsys: pytest.CaptureFixture[str], plain: Path, tmp_path: Path) -> None:
    words = ["export", str(plain), str(tmp_path / "out"), "--as", "projector", "--self-contained"]
    assert main(words) != 0
    assert "--self-contained: is for this project's own folder, found --as projector" in capsys.readouterr().err
