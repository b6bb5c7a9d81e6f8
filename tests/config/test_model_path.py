"""`model.path` in a YAML: what it stands for, what may stand beside it, and what is seen before anything is built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from tiny_model import tiny_model_folder
from tiny_run import BARE, REPO_ROOT, convert_shards

from composer_path.config.files import check_files
from composer_path.config.model_path import expand_model_path
from composer_path.config.reading import ConfigError, load_config, plain
from composer_path.planning.plan import Machine, SampleSize, make_plan
from composer_path.run.fingerprint import fingerprint, weights_files


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("exported") / "model")


def yaml_of(folder: Path, model: dict[str, Any], **sections: Any) -> Path:
    """The demo's stage 2 with another model section."""
    content: Any = OmegaConf.to_container(OmegaConf.load(REPO_ROOT / "yamls" / "demo" / "finetune.yaml"))
    content["model"] = {"trainable": ["projector", "language_model"], "attention": "sdpa", **model}
    content |= sections
    file = folder / "run.yaml"
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return file


def problems_of(folder: Path, model: dict[str, Any], **sections: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(yaml_of(folder, model, **sections))
    return caught.value.problems


def test_a_folder_stands_for_the_sections_of_its_parts_and_the_tokenizer(tmp_path: Path, exported: Path) -> None:
    settings = plain(load_config(yaml_of(tmp_path, {"path": str(exported)}, tokenizer=None)))
    model = settings["model"]
    assert "path" not in model and settings["tokenizer"]["path"] == str(exported)
    assert model["vision_encoder"]["name"] == "timm/vit_tiny_patch16_224"
    places = model["vision_encoder"]["weights"], model["projector"]["weights"], model["language_model"]["path"]
    assert places == (str(exported),) * 3
    # What is written beside a run's results is read again to the same.
    again = tmp_path / "again.yaml"
    OmegaConf.save(load_config(yaml_of(tmp_path, {"path": str(exported)}, tokenizer=None)), again)
    assert plain(load_config(again)) == settings


def test_a_tokenizer_of_its_own_stays_and_an_override_may_name_the_folder(tmp_path: Path, exported: Path) -> None:
    config = load_config(yaml_of(tmp_path, {}), [f"model.path={exported}"])
    assert config.tokenizer.path == "test_data/tokenizer" and config.model.projector.weights == str(exported)
    named = {"path": "${variables.shards}/none"}
    assert "there is no folder 'runs/demo/shards/none'" in problems_of(tmp_path, named)[0]


def test_what_isnt_weights_may_stand_beside_it_and_what_it_says_may_not(tmp_path: Path, exported: Path) -> None:
    beside: dict[str, Any] = {"language_model": {"resize_embeddings": True}, "vision_encoder": {"tokens": "patches"}}
    model = plain(load_config(yaml_of(tmp_path, {"path": str(exported), **beside})))["model"]
    assert model["language_model"]["resize_embeddings"] is True and model["vision_encoder"]["tokens"] == "patches"
    twice = {
        "vision_encoder": {"weights": "other"},
        "language_model": {"path": "other"},
        "projector": {"type": "linear"},
    }
    found = problems_of(tmp_path, {"path": str(exported), **twice})
    for key in ("vision_encoder.weights", "language_model.path", "projector.type"):
        assert any(line.startswith(f"model.{key}: stands beside model.path, '{exported}'") for line in found), key


@pytest.mark.parametrize("value", [7, True, ["a"], {"a": 1}])
def test_a_path_that_is_no_text_is_one_line(tmp_path: Path, value: Any) -> None:
    assert problems_of(tmp_path, {"path": value})[0].startswith("model.path: found ")


def test_null_is_no_path_and_an_endless_interpolation_is_told(tmp_path: Path) -> None:
    config = OmegaConf.create({"model": {"path": None, "trainable": ["projector"]}})
    assert not list(expand_model_path(config)) and config == {"model": {"trainable": ["projector"]}}
    config = OmegaConf.create({"model": {"path": "${nowhere}"}})
    assert [line.startswith("model.path: can't be filled in") for line in expand_model_path(config)] == [True]


def test_plan_fingerprint_and_check_know_what_it_stands_for(tmp_path: Path, exported: Path) -> None:
    shards = convert_shards(tmp_path / "shards")
    more = [f"variables.shards={shards}", f"save_root={tmp_path}", f"tokenizer.path={exported}", *BARE]
    config = load_config(yaml_of(tmp_path, {"path": str(exported)}), more)
    assert check_files(plain(config)) == []
    assert make_plan(config, Machine(1, 80e9, 1e14), SampleSize(100, 20, 1)).parameters["language_model"][0] > 1000
    settings = plain(config)
    assert fingerprint(settings, {})["model.vision_encoder.name"] == "timm/vit_tiny_patch16_224"
    assert [file.name for file in weights_files(settings)["vision_encoder"]] == ["model.safetensors"]


def test_a_check_sees_a_tokenizer_that_is_too_large_for_the_folder(tmp_path: Path, exported: Path) -> None:
    shards = convert_shards(tmp_path / "shards")
    shutil.copytree(exported, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    said = json.loads(file.read_text())
    said["text_config"]["vocab_size"], said["image_token_id"] = 500, 499
    file.write_text(json.dumps(said))
    more = [f"variables.shards={shards}", f"save_root={tmp_path}", *BARE]
    config = load_config(yaml_of(tmp_path, {"path": str(tmp_path / "model")}), more)
    found = check_files(plain(config))
    assert any("its ids must be below the language model's 500 embeddings" in line for line in found), found
