from __future__ import annotations

import json
from pathlib import Path

import pytest
from demo_model import HELDOUT, IMAGES

from composer_path.harnesses.lmms_eval_records import main, messages, results
from composer_path.records.messages import read_messages


def test_records_become_two_tasks_whose_messages_are_the_questions(tmp_path: Path) -> None:
    given = ["--data", str(HELDOUT), "--images", str(IMAGES), "--out", str(tmp_path), "--name", "ours"]
    assert main(given) == 0
    rows = [json.loads(line) for line in (tmp_path / "ours.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 140 and {"ours.yaml", "ours_loss.yaml"} < {file.name for file in tmp_path.iterdir()}
    plain = [row for row in rows if "First: <image>" not in row["question"]][::20]
    assert [read_messages(messages(row)).turns[0].text for row in plain] == [row["question"] for row in plain]
    assert [len(read_messages(messages(row)).pictures) for row in plain] == [len(row["images"]) for row in plain]


def test_an_answer_counts_as_evaluate_counts_it() -> None:
    doc = {"options": ["tissue", "background"], "answer": "tissue"}
    assert results(doc, ["It is tissue."]) == {"accuracy": 1.0, "unparsed": 0.0}
    assert results(doc, ["neither"]) == {"accuracy": 0.0, "unparsed": 1.0}


@pytest.mark.parametrize("name", ["a: b", "../x", "A", ""])
def test_a_name_that_is_no_tasks_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--data", str(HELDOUT), "--images", str(IMAGES), "--out", str(tmp_path / "out"), "--name", name]
    assert main(given) == 2 and "name of a task" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
