"""How much sooner answers come together than one by one: the held-out closed questions, asked of the demo's model.

python -m benchmarks.asking_speed MODEL

MODEL is what `make demo` exports (runs/demo/exported). Each way reads the same pictures anew and asks the same
questions greedily, by one thread. The answers must be equal, word for word, before a time is told.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import UnequalError, interleaved, paired_ratio, print_table, process_time, write_result
from composer_path.asking.assistant import Assistant
from composer_path.asking.closed_questions import ClosedQuestion, read_closed_questions
from composer_path.asking.sampling import Sampling
from composer_path.images.folder import resolve_image
from composer_path.records.conversation import Turn

TEST_DATA = Path(__file__).resolve().parent.parent / "test_data"
BATCH_SIZE = 32
NEW_TOKENS = 16
REPETITIONS = 5
Asked = Sequence[tuple[ClosedQuestion, list[Any]]]


def one_by_one(assistant: Assistant, asked: Asked) -> list[str]:
    return [assistant.answer(question.turns, images, max_new_tokens=NEW_TOKENS) for question, images in asked]


def together(assistant: Assistant, asked: Asked) -> list[str]:
    assistant.features.forget()
    prompts = [
        assistant.prompt([Turn(role, text) for role, text in question.turns], images) for question, images in asked
    ]
    return assistant.answers(prompts, Sampling(NEW_TOKENS), batch_size=BATCH_SIZE)


def main() -> int:
    """Measure, print, write."""
    (model,) = sys.argv[1:]
    torch.set_num_threads(1)  # idle threads that wait for each other would count as work
    assistant = Assistant.from_pretrained(model, device="cpu")
    questions = read_closed_questions(TEST_DATA / "heldout.json")
    files = [[resolve_image(str(one), TEST_DATA / "imgs") for one in question.images] for question in questions]
    pictures = {path: assistant.read_image(path) for paths in files for path in paths}
    asked = [
        (question, [pictures[path].clone() for path in paths]) for question, paths in zip(questions, files, strict=True)
    ]
    ways: dict[str, Callable[[Assistant, Asked], list[str]]] = {"one by one": one_by_one, "together": together}
    expected = one_by_one(assistant, asked)
    if (found := together(assistant, asked)) != expected:
        differ = sum(one != other for one, other in zip(found, expected, strict=True))
        raise UnequalError(f"{differ} of {len(expected)} answers differ; no time is reported")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _, name in interleaved(list(ways), REPETITIONS):
        seconds, _answers = process_time(lambda name=name: ways[name](assistant, asked))
        times[name].append(seconds)
    ratio = paired_ratio(times["one by one"], times["together"])
    print_table(["way", "seconds of CPU"], [[name, min(values)] for name, values in times.items()])
    print(f"{len(asked)} questions about {len(pictures)} pictures, {len(set(expected))} distinct answers: equal")
    print(f"one by one over together: {ratio['median']:.2f}")
    what = {"questions": len(asked), "pictures": len(pictures), "distinct_answers": len(set(expected))}
    what |= {"batch_size": BATCH_SIZE, "max_new_tokens": NEW_TOKENS}
    write_result("asking_speed", {**what, "cpu_seconds": times, "one_by_one_over_together": ratio})
    return 0


if __name__ == "__main__":
    sys.exit(main())
