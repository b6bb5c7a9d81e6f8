"""How a run starts: one line says where from; what changed is applied or refused, and stands beside the results."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tiny_run import Interrupted, Witness, convert_shards, load_tiny_config, run, weights_of

from composer_path.checkpoints.manifest import CheckpointError

MORE = ["eval_loader=null", "model.projector.weights=null", "trainer.save_interval=1ba", "trainer.max_duration=3ba"]


@pytest.fixture
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_shards(tmp_path_factory.getbasetemp() / "road" / "shards")


@pytest.fixture
def stopped(shards: Path, tmp_path: Path) -> Any:
    """A run that was stopped after its first step; a function that goes on with it, with other words."""
    with pytest.raises(Interrupted):
        run(load_tiny_config("finetune", shards, tmp_path, MORE), Witness(1))

    def go_on(*words: str, stage: str = "finetune") -> tuple[Any, Witness]:
        return run(load_tiny_config(stage, shards, tmp_path, [*MORE, *words]))

    return go_on


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("composer_path.run.start")]


def test_one_line_says_new_or_from_where(
    stopped: Any, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    stopped()
    assert lines(caplog) == [f"goes on from {tmp_path}/finetune/checkpoints/ep0-ba1, after step 1"]
    caplog.clear()
    run(load_tiny_config("finetune", shards, tmp_path / "other", [*MORE, "trainer.max_duration=1ba"]))
    assert lines(caplog) == ["a new run"]


def test_what_changed_is_applied_said_and_written_beside_the_results(
    stopped: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    words = "optimizer.lr=1.0e-4", "optimizer.weight_decay=0.5", "trainer.max_duration=4ba"
    trainer, _ = stopped(*words)
    found = [
        "optimizer.lr: 0.002 before, now 0.0001",
        "optimizer.weight_decay: 0.0 before, now 0.5",
        "trainer.max_duration: '3ba' before, now '4ba'",
    ]
    assert lines(caplog)[1:] == [f"from step 1 on: {line}" for line in found]
    assert trainer.state.optimizers[0].param_groups[0]["weight_decay"] == 0.5
    path = tmp_path / "finetune" / "config.yaml"
    assert path.read_text().splitlines()[:3] == [f"# from step 1 on: {line}" for line in found]
    assert OmegaConf.load(path)["optimizer"]["lr"] == 1e-4
    stopped(*words, "trainer.max_duration=5ba")  # the history goes on
    assert path.read_text().splitlines()[2:4] == [
        f"# from step 1 on: {found[2]}",
        "# from step 4 on: trainer.max_duration: '4ba' before, now '5ba'",
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["seed=99"], "seed: this run began with 17, found 99"),
        (
            ["model.trainable=[projector]"],
            "model.trainable: this run began with ['projector', 'language_model']",
        ),
        (["train_loader.dataset.fit=crop"], "train_loader.dataset.fit: this run began with 'pad', found 'crop'"),
        (["train_loader.dataset.template=plain"], "train_loader.dataset.template: this run began with"),
    ],
)
def test_what_cant_change_is_refused_and_nothing_is_touched(
    stopped: Any, tmp_path: Path, words: list[str], line: str
) -> None:
    folder = tmp_path / "finetune"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(CheckpointError) as caught:
        stopped(*words)
    assert f"{folder}/checkpoints/ep0-ba1: can't go on with other settings than it began with:" in str(caught.value)
    assert line in str(caught.value) and "another trainer.run_name" in str(caught.value)
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before


def test_another_stages_checkpoint_is_refused_by_name(stopped: Any) -> None:
    with pytest.raises(
        CheckpointError, match=r"model\.trainable: this run began with \['projector', 'language_model'\]"
    ):
        stopped("trainer.run_name=finetune", stage="pretrain")


def test_a_run_that_was_stopped_and_then_made_shorter_isnt_said_to_have_results(
    stopped: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped("trainer.max_duration=1ba")
    [line] = [record.getMessage() for record in caplog.records if record.name == "composer_path.train"]
    assert line.startswith("this run has no step left") and f"export {tmp_path}/finetune FOLDER" in line


def test_a_run_that_has_ended_stays_as_it_is(stopped: Any, tmp_path: Path) -> None:
    trainer, _ = stopped()
    weights, config = weights_of(trainer), tmp_path / "finetune" / "config.yaml"
    before = {path: path.read_bytes() for path in (tmp_path / "finetune").glob("*.*") if path.is_file()}
    again, witness = stopped("optimizer.lr=1.0")
    assert not witness.losses and config in before
    assert {path: path.read_bytes() for path in (tmp_path / "finetune").glob("*.*") if path.is_file()} == before
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(again).items())
