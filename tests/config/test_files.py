"""What is missing on the disk is said before a run starts, with key and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from composer_path.config.files import check_start
from composer_path.train import main

REPO_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """A configuration whose files are all there."""
    for name in ("train", "heldout"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.json").touch()
    (tmp_path / "projector.safetensors").touch()
    return {
        "save_root": str(tmp_path / "runs"),
        "tokenizer": {"path": str(tmp_path)},
        "model": {
            "vision_encoder": {"name": "coca_vit-l", "weights": None},
            "projector": {"weights": str(tmp_path / "projector.safetensors")},
            "language_model": {"path": str(tmp_path)},
        },
        "train_loader": {"dataset": {"local": str(tmp_path / "train"), "remote": None}},
        "eval_loader": {"dataset": {"local": str(tmp_path), "split": "heldout"}},
        "trainer": {"run_name": "finetune"},
    }


def test_a_run_whose_files_are_there_may_start(settings: dict[str, Any]) -> None:
    assert check_start(settings) == []


def test_all_that_is_missing_is_listed_at_once_with_its_key(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["tokenizer"]["path"] = "nowhere"
    settings["model"]["vision_encoder"]["weights"] = "vision.pt"
    settings["model"]["projector"]["weights"] = "projector.pt"
    settings["model"]["language_model"]["path"] = "llama"
    settings["train_loader"]["dataset"]["local"] = str(tmp_path / "other")
    settings["eval_loader"]["dataset"]["split"] = "other"
    keys = [problem.split(":")[0] for problem in check_start(settings)]
    assert sorted(keys) == [
        "eval_loader.dataset.local",
        "model.language_model.path",
        "model.projector.weights",
        "model.vision_encoder.weights",
        "tokenizer.path",
        "train_loader.dataset.local",
    ]


def test_shards_that_are_fetched_need_not_lie_here(settings: dict[str, Any]) -> None:
    settings["train_loader"]["dataset"] = {"local": "cache", "remote": "s3://bucket/train"}
    assert check_start(settings) == []


def test_each_stream_of_a_mixture_is_looked_up(settings: dict[str, Any], tmp_path: Path) -> None:
    streams = {
        "here": {"local": str(tmp_path / "train")},
        "lost": {"local": "lost"},
        "far": {"local": "c", "remote": "r"},
    }
    settings["train_loader"]["dataset"] = {"streams": streams}
    [problem] = check_start(settings)
    assert problem.startswith("train_loader.dataset.streams.lost.local: found no index.json in 'lost'")


def test_only_rank_0_looks_for_weights(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    settings["model"]["projector"]["weights"] = "only-on-the-first-node.safetensors"
    assert len(check_start(settings)) == 1
    monkeypatch.setenv("RANK", "8")
    assert check_start(settings) == []


def test_results_of_an_earlier_run_are_not_mixed_with_new_ones(settings: dict[str, Any]) -> None:
    checkpoints = Path(settings["save_root"], "finetune", "checkpoints")
    checkpoints.mkdir(parents=True)
    assert check_start(settings) == []
    (checkpoints / "ep1-ba20").mkdir()
    [problem] = check_start(settings)
    assert problem.startswith("trainer.run_name: found checkpoints of an earlier run")
    for way_out in ({"autoresume": True}, {"save_overwrite": True}, {"load_path": "x"}):
        assert check_start(settings | {"trainer": settings["trainer"] | way_out}) == []


def test_the_command_says_it_in_a_line_a_problem_and_ends_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"save_root={tmp_path}", f"variables.shards={tmp_path}/none"]
    assert main([str(REPO_ROOT / "yamls" / "demo" / "finetune.yaml"), *overrides]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and "Traceback" not in "".join(lines)
    assert lines[1].strip().startswith("train_loader.dataset.local: found no index.json in")
    assert lines[3].strip().startswith("model.projector.weights: found no")
