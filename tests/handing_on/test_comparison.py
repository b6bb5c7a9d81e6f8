"""Two models compared: what differs is told, in numbers that are right; what doesn't, isn't."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from handed_models import CLIP, IMAGES, MLP, trained
from safetensors.torch import save_file

from composer_path.cli import main
from composer_path.handing_on.comparison import compare, difference
from composer_path.handing_on.language_model_folder import write_language_model
from composer_path.handing_on.llava_hf import write_llava_hf
from composer_path.run.export import Trained, write_model

PICTURE = str(IMAGES / sorted(path.name for path in IMAGES.iterdir())[0])


@pytest.fixture(scope="module")
def found() -> Trained:
    return trained(CLIP, MLP)


@pytest.fixture(scope="module")
def ours(found: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ours")
    write_model(folder, found.model, found.weights, found.tokenizer, found.text, found.images)
    return folder


def file_of(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, path)
    return path


def test_equal_files_are_equal_and_differences_are_counted_and_measured(tmp_path: Path) -> None:
    weights = {"a.x": torch.arange(6.0), "a.y": torch.ones(2, 3), "b.z": torch.tensor([1, 2])}
    a = file_of(tmp_path / "a.safetensors", **weights)
    assert compare(a, file_of(tmp_path / "b.safetensors", **weights)).equal
    changed = weights | {"a.x": torch.tensor([0, 1, 2.5, 3, 4, 4]), "b.z": torch.tensor([1, 2], dtype=torch.int32)}
    result = compare(a, file_of(tmp_path / "b.safetensors", **changed))
    one = result.tensors["a.x"]
    assert (one.elements, one.differing, one.max_abs, one.max_rel) == (6, 2, 1.0, 0.2)
    assert result.tensors["b.z"].dtypes == ("int64", "int32") and result.tensors["b.z"].differing == 0
    sums = result.modules()
    assert sums["a"] == {"tensors": 2, "differ": 1, "elements": 12, "differing": 2, "max_abs": 1.0, "max_rel": 0.2}
    assert sums["in all"]["elements"] == 14 and not result.equal


def test_what_is_there_once_or_in_another_shape_is_named(tmp_path: Path) -> None:
    a = file_of(tmp_path / "a.safetensors", x=torch.ones(2), y=torch.ones(2))
    b = file_of(tmp_path / "b.safetensors", z=torch.ones(2), y=torch.ones(3))
    result = compare(a, b)
    assert (result.only_in_a, result.only_in_b, result.shapes) == (["x"], ["z"], {"y": ((2,), (3,))})


def test_no_numbers_are_the_same_only_where_both_are_none() -> None:
    nan, inf = float("nan"), float("inf")
    assert difference(torch.tensor([nan, inf, 1]), torch.tensor([nan, inf, 1])).differing == 0
    found = difference(torch.tensor([nan, inf, 1, 2]), torch.tensor([1.0, -inf, 1, 2]))
    assert found.differing == 2 and found.max_abs == inf
    assert difference(torch.zeros(0, 3), torch.zeros(0, 3)).elements == 0


def test_pieces_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("composer_path.handing_on.comparison.CHUNK", 3)
    a, b = torch.arange(10.0), torch.arange(10.0)
    b[[1, 8]] += torch.tensor([0.5, 2])
    found = difference(a, b)
    assert (found.differing, found.max_abs) == (2, 2.0)


def test_our_folder_and_its_stock_llava_are_one_model_but_for_the_image_tokens_row(
    found: Trained, ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_llava_hf(tmp_path / "llava", found)
    result = compare(ours, tmp_path / "llava")
    assert all(one.differing == 0 for one in result.tensors.values()) and len(result.tensors) > 50
    assert not result.only_in_a
    assert result.only_in_b == ["vision_encoder.trunk.norm.bias", "vision_encoder.trunk.norm.weight"]
    assert set(result.shapes) <= {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"}
    words = ["compare", str(ours), str(tmp_path / "llava"), "--logits", "--image", PICTURE, "--json"]
    assert main(words) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["logits"]["max_rel"] < 1e-5 and said["logits"]["other_choices"] == 0


def test_equal_tensors_that_are_read_otherwise_are_another_model(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(ours, tmp_path / "other"))
    content = json.loads((other / "config.json").read_text())
    content["text_config"]["num_attention_heads"] = 2
    content |= {"transformers_version": "4.0.0", "dtype": "bfloat16"}  # of which no number depends
    del content["text_config"]["max_position_embeddings"]  # a default, to another version
    (other / "config.json").write_text(json.dumps(content))
    found = compare(ours, other)
    assert found.settings == {"text_config.num_attention_heads": (4, 2)} and not found.equal
    assert main(["compare", str(ours), str(other)]) == 1
    said = capsys.readouterr().out
    assert "other settings: text_config.num_attention_heads: 4 in A, 2 in B\n" in said
    assert said.endswith("different\n")
    content["text_config"]["num_attention_heads"] = 4
    (other / "config.json").write_text(json.dumps(content))
    assert compare(ours, other).equal


def test_a_folder_whose_shards_and_index_disagree_is_refused(tmp_path: Path) -> None:
    for name, keys in (("model-1.safetensors", "ab"), ("model-2.safetensors", "bc")):
        file_of(tmp_path / name, **{key: torch.ones(1) for key in keys})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "c": "model-2.safetensors"}}))
    with pytest.raises(ValueError, match="holds tensors that another shard holds too: b"):
        compare(tmp_path, tmp_path)
    file_of(tmp_path / "model-2.safetensors", c=torch.ones(1))
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "d": "model-2.safetensors"}}))
    with pytest.raises(ValueError, match="names what isn't there: d in"):
        compare(tmp_path, tmp_path)


def test_the_language_model_alone_is_found_in_the_whole(found: Trained, ours: Path, tmp_path: Path) -> None:
    write_language_model(tmp_path / "alone", found)
    result = compare(ours, tmp_path / "alone")
    language = [name for name in found.weights if name.startswith("language_model.")]
    assert set(language) <= set(result.tensors) | set(result.shapes)
    assert all(one.differing == 0 for one in result.tensors.values()) and not result.only_in_b


def test_the_verb_ends_in_0_1_or_2(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(ours), str(ours)]) == 0
    assert capsys.readouterr().out.endswith("equal\n")
    file = file_of(tmp_path / "a.safetensors", x=torch.ones(2))
    other = file_of(tmp_path / "b.safetensors", x=torch.tensor([1, 1.5]))
    assert main(["compare", str(file), str(other)]) == 1
    said = capsys.readouterr().out
    assert "x: 0.5 (relative 0.5), 1 of 2 differ" in said and said.endswith("different\n")
    mistakes: list[tuple[list[Any], str]] = [
        ([file, tmp_path / "nowhere"], "no file or folder"),
        ([file, tmp_path], "holds none of model.safetensors"),
        ([file, other, "--logits"], "must both be given"),
        ([file, other, "--question", "?"], "is for --logits"),
        ([file, other, "--logits", "--image", PICTURE], "one of the folders must be one that export wrote"),
    ]
    (tmp_path / "c.safetensors").write_bytes(b"\xff" * 30)
    mistakes.append(([file, tmp_path / "c.safetensors"], "can't be read"))
    for words, said in mistakes:
        assert main(["compare", *map(str, words)]) == 2
        assert said in capsys.readouterr().err
