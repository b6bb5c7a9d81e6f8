"""kaiko-eva in an environment of its own: the documented configuration on the demo's model and our records."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from demo_model import HELDOUT, IMAGES, demo_run, exported
from other_pythons import python_of, run_there

from composer_path.asking.assistant import Assistant
from composer_path.asking.closed_questions import evaluate_closed, read_closed_questions


@pytest.mark.slow
def test_kaiko_eva_finds_as_many_right_answers_as_evaluate(tmp_path: Path, repo_root: Path) -> None:
    python = python_of("COMPOSER_PATH_EVA_PYTHON", "eva.multimodal")
    folder = exported(demo_run(tmp_path / "demo"), tmp_path / "exported")
    data = tmp_path / "tissue.json"
    records = [record for record in json.loads(HELDOUT.read_text("utf-8")) if record["meta"]["kind"] == "tissue"]
    data.write_text(json.dumps(records), encoding="utf-8")
    command = ["-m", "eva", "test", "--config", str(repo_root / "docs" / "harnesses" / "kaiko_eva_records.yaml")]
    where = {"MODEL": str(folder), "RECORDS": str(data), "IMAGES": str(IMAGES), "ACCELERATOR": "cpu", "BATCH_SIZE": "8"}
    said = run_there(
        python,
        command,
        tmp_path / "eva",
        **where,
        OUTPUT_ROOT=str(tmp_path / "logs"),
        LITELLM_LOCAL_MODEL_COST_MAP="True",
    )
    found = re.search(r"MulticlassAccuracy\W+([\d.]+)", said)
    assert found, said[-3000:]
    assistant = Assistant.from_pretrained(folder, device="cpu", dtype=torch.float32)
    ours = evaluate_closed(assistant, read_closed_questions(data), IMAGES)
    assert len(records) == ours.count("asked") == 24
    assert float(found[1]) == pytest.approx(ours.count("correct") / 24, abs=1e-4)
