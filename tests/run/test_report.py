"""What a run notes of itself, and the table over several runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from composer.core import State
from composer.loggers import Logger
from omegaconf import OmegaConf

from composer_path.asking.run_table import format_closed, format_runs, read_summaries
from composer_path.run.report import RunReport

COMPARISON = {
    "kinds": {
        "stain": {
            "asked": 20,
            "majority": 0.5,
            "with_image": {"correct": 19, "unparsed": 0},
            "blank_image": {"correct": 8, "unparsed": 4},
        }
    },
    "all": {
        "asked": 20,
        "majority": 0.5,
        "with_image": {"correct": 19, "unparsed": 0},
        "blank_image": {"correct": 8, "unparsed": 4},
    },
}


def make_run(root: Path, name: str, ended: float, **changes: Any) -> Path:
    folder = root / name
    (folder / "checkpoints").mkdir(parents=True)
    summary = {
        "run": name,
        "steps": 20,
        "samples_per_second": 34.56,
        "tokens_per_second": 1234.5,
        "heldout_token_loss": {"before": 10.8114, "after": 10.1051},
    }
    (folder / "summary.json").write_text(json.dumps(summary | changes))
    os.utime(folder / "summary.json", (ended, ended))
    return folder


def note_evaluation(report: RunReport, batch: int, token_loss: float) -> None:
    """What Composer tells the report when an evaluation ends."""
    state = MagicMock(spec=State, timestamp=SimpleNamespace(batch=batch))
    metric = SimpleNamespace(compute=lambda: torch.tensor(token_loss))
    state.eval_metrics = {"heldout": {"token_loss": metric}}
    report.eval_end(state, MagicMock(spec=Logger))


def test_the_table_has_a_row_a_run_in_the_order_in_which_they_ended(tmp_path: Path) -> None:
    make_run(tmp_path, "finetune", ended=2000, heldout_token_loss={})
    make_run(tmp_path, "pretrain", ended=1000)
    rows = [line.split() for line in format_runs(tmp_path).splitlines()[:3]]
    assert rows[0] == ["run", "steps", "held-out", "loss", "before", "after", "samples/s", "tokens/s"]
    assert rows[1] == ["pretrain", "20", "10.811", "10.105", "34.6", "1234"]
    assert rows[2] == ["finetune", "20", "-", "-", "34.6", "1234"]


def test_each_place_is_listed_once_and_only_if_it_is_there(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "pretrain", ended=1000)
    (folder / "projector.safetensors").touch()
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "processor_config.json").touch()
    places = [line.split() for line in format_runs(tmp_path).split("\n\n")[-1].splitlines()]
    assert places == [
        ["pretrain", "checkpoints", str(folder / "checkpoints")],
        ["pretrain", "projector", str(folder / "projector.safetensors")],
        ["exported", "model", str(exported)],
    ]


@pytest.mark.parametrize("model", ["exported", "finetune/model"])
def test_closed_questions_are_shown_for_every_model_that_was_asked(tmp_path: Path, model: str) -> None:
    make_run(tmp_path, "finetune", ended=1000)
    (tmp_path / model).mkdir(parents=True)
    (tmp_path / model / "evaluation.json").write_text(json.dumps(COMPARISON))
    shown = format_runs(tmp_path)
    assert format_closed(COMPARISON) in shown
    assert str(tmp_path / model) in shown


def test_closed_questions_show_majority_image_blank_and_answers_that_name_no_option() -> None:
    _, stain, everything = format_closed(COMPARISON).splitlines()
    assert stain.split() == ["stain", "20", "50%", "95%", "40%", "0,", "blank", "4"]
    assert everything.split()[0] == "all"


def test_a_folder_without_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no summary\.json in a folder below"):
        read_summaries(tmp_path)


def test_the_kept_configuration_names_environment_variables_but_not_their_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_ROOT", "/secret/place")
    config = OmegaConf.create({"variables": {"data": "${oc.env:DATA_ROOT}"}, "local": "${variables.data}/train"})
    RunReport(tmp_path, {}).save_config(config, [])
    kept = (tmp_path / "config.yaml").read_text()
    assert "${oc.env:DATA_ROOT}" in kept and "secret" not in kept


def test_the_loss_before_training_survives_a_resume_and_the_newest_one_is_the_loss_after(tmp_path: Path) -> None:
    first = RunReport(tmp_path, {})
    note_evaluation(first, batch=0, token_loss=10.5)
    note_evaluation(first, batch=5, token_loss=3.0)
    resumed = RunReport(tmp_path, {})
    resumed.load_state_dict(first.state_dict())
    note_evaluation(resumed, batch=10, token_loss=2.0)
    assert resumed.summary["heldout_token_loss"] == {"before": 10.5, "after": 2.0}


def test_a_run_that_never_evaluated_resumes_without_a_loss(tmp_path: Path) -> None:
    resumed = RunReport(tmp_path, {})
    resumed.load_state_dict(RunReport(tmp_path, {}).state_dict())
    assert resumed.summary["heldout_token_loss"] == {}
