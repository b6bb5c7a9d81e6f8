"""lmms-eval in an environment of its own: our entry point, on the demo's model and tasks of our records."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from demo_model import HELDOUT, IMAGES, demo_run, exported
from other_pythons import python_of, run_there

from composer_path.asking.assistant import Assistant
from composer_path.asking.closed_questions import evaluate_closed, read_closed_questions
from composer_path.harnesses.lmms_eval_records import write_tasks

KINDS = ("tissue", "pair_nuclei", "letter")


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    python = python_of("COMPOSER_PATH_LMMS_EVAL_PYTHON", "lmms_eval")
    work = tmp_path_factory.mktemp("lmms")
    folder = exported(demo_run(work / "demo"), work / "exported")
    data = work / "records.json"
    records = [record for record in json.loads(HELDOUT.read_text("utf-8")) if record["meta"]["kind"] in KINDS]
    data.write_text(json.dumps(records), encoding="utf-8")
    assert write_tasks(data, IMAGES, work / "tasks", "ours") == len(records) == 44
    return {"python": python, "work": work, "folder": folder, "data": data}


def of_lmms_eval(tried: dict[str, Any], task: str, *more: str) -> dict[str, Any]:
    """Metrics of a task."""
    out = tried["work"] / f"{task}_{len(more)}"
    command = [
        *("-m", "lmms_eval", "--model", "composer_path", "--model_args", f"pretrained={tried['folder']},dtype=fp32"),
        *("--tasks", task, "--include_path", str(tried["work"] / "tasks"), "--batch_size", "8", "--device", "cpu"),
        *("--output_path", str(out), *more),
    ]
    run_there(
        tried["python"], command, tried["work"] / "run", HF_DATASETS_OFFLINE="1", HF_HOME=str(tried["work"] / "hf")
    )
    (file,) = out.rglob("*results.json")
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["results"][task]
    return results


@pytest.mark.slow
def test_lmms_eval_finds_as_many_right_answers_as_evaluate(tried: dict[str, Any]) -> None:
    assistant = Assistant.from_pretrained(tried["folder"], device="cpu", dtype=torch.float32)
    ours = evaluate_closed(assistant, read_closed_questions(tried["data"]), IMAGES)
    for more in ((), ("--force_simple",)):
        found = of_lmms_eval(tried, "ours", *more)
        assert found["accuracy,none"] == pytest.approx(ours.count("correct") / 44), more
        assert found["unparsed,none"] == pytest.approx(ours.count("unparsed") / 44), more


@pytest.mark.slow
def test_lmms_eval_takes_the_option_of_the_least_loss(tried: dict[str, Any]) -> None:
    found = of_lmms_eval(tried, "ours_loss", "--force_simple")
    assert 0.6 < found["acc,none"] <= 1
