"""Closed questions of a file of records as tasks of lmms-eval, written by `python -m` this module.

It writes a folder for lmms-eval's `--include_path` with two tasks: NAME asks for answers, and NAME_loss (with
`--force_simple`) takes the option of the least loss. Only the first question of a conversation is asked.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from composer_path.asking.closed_questions import parse_answer, read_closed_questions
from composer_path.images.fitting import rgb_image
from composer_path.images.folder import resolve_image
from composer_path.records.image_tags import IMAGE_TAG

_HERE = "composer_path.harnesses.lmms_eval_records"
_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
doc_to_visual: !function {here}.pictures
doc_to_messages: !function {here}.messages
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
process_results: !function {here}.results
generation_kwargs:
  max_new_tokens: {longest}
  until: []
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
  - metric: unparsed
    aggregation: mean
    higher_is_better: false
metadata:
  version: 1.0
"""
_LOSS = """\
task: {name}_loss
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: multiple_choice
doc_to_visual: !function {here}.pictures
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: index
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def write_tasks(data: Path, images: Path, folder: Path, name: str) -> int:
    """Write both tasks and their questions; returns how many.

    Raises:
        ValueError: The name can't be a task's, or a record breaks a rule or asks after an answer.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"name of a task: must be small letters, digits and '_'; found {name!r}; choose another")
    rows = []
    longest = 0
    for question in read_closed_questions(data):
        if len(question.turns) != 1 or question.system is not None:
            raise ValueError(f"{question.where}: for lmms-eval a question stands alone; found more; leave it out")
        if not all(isinstance(image, str) for image in question.images):
            raise ValueError(f"{question.where}: for lmms-eval images are files; found a region; cut it out first")
        files = [str(resolve_image(str(image), images)) for image in question.images]
        longest = max(longest, *(len(option.encode()) for option in question.options))
        rows.append(
            {
                "question": question.turns[0][1],
                "images": files,
                "options": list(question.options),
                "answer": question.answer,
                "index": question.options.index(question.answer),
                "kind": question.kind,
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    questions = (folder / f"{name}.jsonl").resolve()
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    told = {"name": name, "questions": json.dumps(str(questions)), "here": _HERE, "longest": longest + 8}
    (folder / f"{name}.yaml").write_text(_TASK.format(**told), encoding="utf-8")
    (folder / f"{name}_loss.yaml").write_text(_LOSS.format(**told), encoding="utf-8")
    return len(rows)


def pictures(doc: dict[str, Any]) -> list[Any]:
    """A question's pictures, upright and in colour, as Pillow has them."""
    return [rgb_image(Path(file).read_bytes()) for file in doc["images"]]


def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """The question in parts, each on lines of its own: texts, and the pictures where their tags stand."""
    images = pictures(doc)
    texts = doc["question"].split(IMAGE_TAG)
    parts: list[dict[str, Any]] = []
    for place, text in enumerate(texts):
        text = text.removeprefix("\n") if place else text
        text = text.removesuffix("\n") if place < len(images) else text
        parts += [{"type": "text", "text": text}] * bool(text)
        parts += [{"type": "image", "url": image} for image in images[place : place + 1]]
    return [{"role": "user", "content": parts}]


def results(doc: dict[str, Any], said: list[str]) -> dict[str, float]:
    """Whether the answer names the right option, as `composer-path evaluate` reads it, and whether it names one."""
    chosen = parse_answer(said[0], doc["options"])
    return {"accuracy": float(chosen == doc["answer"]), "unparsed": float(chosen is None)}


def main(arguments: list[str] | None = None) -> int:
    """Write the tasks that the command line asks for; 2 where they can't be."""
    parser = argparse.ArgumentParser(prog=f"python -m {_HERE}", description="Records' closed questions for lmms-eval.")
    parser.add_argument("--data", type=Path, required=True, help="records, a JSON list or JSONL")
    parser.add_argument("--images", type=Path, required=True, help="the folder of their images")
    parser.add_argument("--out", type=Path, required=True, help="a folder for lmms-eval's --include_path")
    parser.add_argument("--name", default="records", help="of the task")
    given = parser.parse_args(arguments)
    try:
        number = write_tasks(given.data, given.images, given.out, given.name)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{number} questions in the tasks {given.name} and {given.name}_loss")
    return 0


if __name__ == "__main__":
    sys.exit(main())
