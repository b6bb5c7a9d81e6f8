"""The verbs `evaluate` and `summary`: what one leaves, the other shows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_model import IMAGES, tiny_model_folder

from composer_path.cli import main


def test_evaluate_prints_a_table_and_leaves_it_beside_the_model_for_summary(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "exported"
    shutil.copytree(tiny_model_folder(tmp_path_factory.getbasetemp() / "tiny_model"), model)
    records = json.loads((IMAGES.parent / "heldout.json").read_text(encoding="utf-8"))
    closed = [record for record in records if "options" in record["meta"]][:6]
    data = tmp_path / "closed.json"
    data.write_text(json.dumps(closed), encoding="utf-8")
    assert main(["evaluate", str(model), "--data", str(data), "--images", str(IMAGES)]) == 0
    table = capsys.readouterr().out
    left = json.loads((model / "evaluation.json").read_text())
    assert left["all"]["asked"] == 6 and set(left["kinds"]) == {record["meta"]["kind"] for record in closed}
    (tmp_path / "pretrain").mkdir()
    summary = {"run": "pretrain", "steps": 2, "samples_per_second": 1.0, "tokens_per_second": 9.0}
    (tmp_path / "pretrain" / "summary.json").write_text(json.dumps(summary | {"heldout_token_loss": {}}))
    assert main(["summary", str(tmp_path)]) == 0
    assert table.strip() in capsys.readouterr().out
