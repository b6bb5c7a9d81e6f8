"""What is exported from a checkpoint is the trained model, whatever kind of checkpoint it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import SHORT_RUNS, road, short_run

from composer_path import PathMLLM
from composer_path.config.reading import load_config
from composer_path.run.export import export_checkpoint, read_checkpoint

LATEST = "checkpoints/latest"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return road(tmp_path_factory.getbasetemp() / "road")


def assert_loads_to(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """The folder is a model with these weights, bit for bit, and behind them a row for the image's token."""
    model = PathMLLM.from_pretrained(folder)
    loaded = dict(model.named_parameters())
    assert loaded.keys() == weights.keys()
    for name, value in weights.items():
        rows = ("embed_tokens" in name or "lm_head" in name) and len(loaded[name]) - len(value)
        assert int(rows) in (0, 1) and torch.equal(loaded[name][: len(value)], value), name
        if rows:
            torch.testing.assert_close(loaded[name][-1].float(), value.float().mean(0), atol=1e-3, rtol=1e-2)
    assert model.image_token_id == 32000 and model.num_embeddings() == 32001


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_sharded_checkpoint_becomes_the_trained_model(runs: Path, tmp_path: Path, stage: str) -> None:
    """Also stage 1's, which holds the projector only: the rest is built again from the run's configuration."""
    config = load_config(runs / stage / "config.yaml")
    export_checkpoint(runs / stage / LATEST, config, tmp_path)
    assert_loads_to(tmp_path, torch.load(runs / f"{stage}.pt")["weights"])
    names = {path.name for path in tmp_path.iterdir()}
    assert {"processor_config.json", "tokenizer.model", "projector.safetensors", "mm_projector.bin"} <= names
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "composer_path"


@pytest.mark.parametrize("kind", SHORT_RUNS)
def test_a_single_file_becomes_the_trained_model(runs: Path, tmp_path: Path, kind: str) -> None:
    notes = short_run(runs, kind)
    folder = Path(notes["root"]) / "finetune"
    export_checkpoint(folder / LATEST, load_config(folder / "config.yaml"), tmp_path)
    assert_loads_to(tmp_path, notes["resumed"]["weights"])


def test_what_a_run_saves_at_its_end_is_what_its_checkpoint_becomes(runs: Path, tmp_path: Path) -> None:
    export_checkpoint(runs / "finetune" / LATEST, load_config(runs / "finetune" / "config.yaml"), tmp_path)
    saved = runs / "finetune" / "model"
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(saved / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    # The folder of an export also has the projector's own files, beside the same configuration.
    assert (tmp_path / "processor_config.json").read_text() == (saved / "processor_config.json").read_text()
    assert (tmp_path / "config.json").read_text() == (saved / "config.json").read_text()


def test_weights_can_be_written_in_bf16(runs: Path, tmp_path: Path) -> None:
    export_checkpoint(runs / "finetune" / LATEST, load_config(runs / "finetune" / "config.yaml"), tmp_path, "bf16")
    weights = torch.load(runs / "finetune.pt")["weights"]
    assert_loads_to(tmp_path, {name: value.bfloat16() for name, value in weights.items()})


def test_an_unknown_dtype_is_refused_with_the_known_ones(runs: Path, tmp_path: Path) -> None:
    config = load_config(runs / "finetune" / "config.yaml")
    with pytest.raises(ValueError, match="unknown 'int8'; choose one of fp32, bf16"):
        export_checkpoint(runs / "finetune" / LATEST, config, tmp_path, "int8")
    assert not (tmp_path / "config.json").exists()


def test_a_checkpoint_of_another_stage_is_refused_with_what_it_lacks(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks \d+ trained tensors, such as \['language_model\."):
        export_checkpoint(runs / "pretrain" / LATEST, load_config(runs / "finetune" / "config.yaml"), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "not_there", set())
    with pytest.raises(ValueError, match=r"is damaged: \.metadata is missing"):
        read_checkpoint(tmp_path, set())


@pytest.fixture
def exported(runs: Path, tmp_path: Path) -> Path:
    """An earlier export, with its evaluation, and a file that somebody put there."""
    folder = tmp_path / "model"
    export_checkpoint(runs / "pretrain" / LATEST, load_config(runs / "pretrain" / "config.yaml"), folder)
    (folder / "evaluation.json").write_text("{}")
    (folder / "notes.txt").write_text("ours")
    return folder


def test_a_new_model_takes_the_earlier_ones_evaluation_with_it_and_leaves_what_others_put_there(
    runs: Path, exported: Path
) -> None:
    export_checkpoint(runs / "finetune" / LATEST, load_config(runs / "finetune" / "config.yaml"), exported)
    assert_loads_to(exported, torch.load(runs / "finetune.pt")["weights"])
    assert not (exported / "evaluation.json").exists()
    assert (exported / "notes.txt").read_text() == "ours"
    assert not list(exported.glob(".*"))


def test_an_export_that_fails_leaves_the_earlier_one_whole(
    runs: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in exported.iterdir()}

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("composer_path.weights.folder.write_tensors", fail)
    with pytest.raises(OSError, match="No space left"):
        export_checkpoint(runs / "finetune" / LATEST, load_config(runs / "finetune" / "config.yaml"), exported)
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before


@pytest.mark.parametrize("config", ['{"model_type": "llama"}', "[]", "{", None])
def test_weights_of_another_program_are_never_written_over(runs: Path, tmp_path: Path, config: str | None) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"theirs")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"must be empty or hold an earlier export, found model-00001-of-00002\.safet"):
        export_checkpoint(runs / "finetune" / LATEST, load_config(runs / "finetune" / "config.yaml"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
