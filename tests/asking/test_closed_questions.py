"""Closed questions: which are asked, what counts as an answer, and what a model that sees nothing reaches."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from composer_path.asking.closed_questions import (
    ClosedQuestion,
    compare_with_blank,
    evaluate_closed,
    majority_accuracy,
    parse_answer,
    read_closed_questions,
)
from composer_path.asking.sampling import Sampling
from composer_path.records.conversation import Turn

TEST_DATA = Path(__file__).resolve().parent.parent.parent / "test_data"
IMAGES = TEST_DATA / "imgs"


class Oracle:
    """Stands in for a model: says "dark" or "pale" by how bright the picture is, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.batches: list[int] = []

    def tokenizer(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [0] * len(text.split())}

    def read_image(self, path: Path, region: None = None) -> torch.Tensor:
        return torch.full((3, 4, 4), 40 if "dark" in path.name else 200, dtype=torch.uint8)

    def prompt(self, turns: Sequence[Turn], images: list[torch.Tensor], *, system: str | None) -> Any:
        return tuple((turn.role, turn.text) for turn in turns), images, system

    def answers(self, prompts: Sequence[Any], sampling: Sequence[Sampling], *, batch_size: int) -> list[str]:
        self.batches.append(len(prompts))
        return [self.answer(*prompt, one.max_new_tokens) for prompt, one in zip(prompts, sampling, strict=True)]

    def answer(self, turns: Any, images: list[torch.Tensor], system: str | None, max_new_tokens: int) -> str:
        self.asked.append((turns, system, max_new_tokens))
        value = images[0].float().mean()
        return "I can't tell." if value == 255 else "Pale." if value > 128 else "It is dark, I think."


@pytest.mark.parametrize("options", [5, "AB", None, [], ["A"], {"A": "x", "B": "y"}])
def test_options_that_are_no_list_are_refused_with_their_record(tmp_path: Path, options: object) -> None:
    turns = [{"from": "human", "value": "A or B?"}, {"from": "gpt", "value": "A"}]
    (tmp_path / "q.json").write_text(
        json.dumps([{"conversations": turns, "meta": {"options": options, "answer": "A"}}])
    )
    with pytest.raises(ValueError, match=r"record 0: meta\.options must be a list of two options or more"):
        read_closed_questions(tmp_path / "q.json")


@pytest.mark.parametrize(
    ("options", "answer", "said"),
    [
        (["A", "B"], "C", r"meta\.answer must be one of meta\.options"),
        (["nest", " Nest. "], "nest", "must differ in more than case and blanks, found two alike"),
        (["A", ""], "A", "must be texts or numbers"),
        (["A", None], "A", "must be texts or numbers"),
        (["A", "B"], None, "must be texts or numbers"),
        (["A", {"text": "B"}], "A", "must be texts or numbers"),
    ],
)
def test_a_question_that_no_answer_is_right_for_is_refused_with_its_record(
    tmp_path: Path, options: object, answer: object, said: str
) -> None:
    turns = [{"from": "human", "value": "A or B?"}, {"from": "gpt", "value": "A"}]
    right = {"conversations": turns, "meta": {"options": ["A", "B"], "answer": "A"}}
    (tmp_path / "q.json").write_text(json.dumps([right, right | {"meta": {"options": options, "answer": answer}}]))
    with pytest.raises(ValueError, match=rf"q\.json': record 1: .*{said}"):
        read_closed_questions(tmp_path / "q.json")


@pytest.fixture
def questions(tmp_path: Path) -> list[ClosedQuestion]:
    for name in ("dark1", "dark2", "light"):
        (tmp_path / f"{name}.jpg").touch()
    options = ("dark", "pale")
    turns = (("human", "<image>\nDark or pale?"),)
    return [
        ClosedQuestion("tone", turns, options, "dark", ("dark1.jpg",), system="One word."),
        ClosedQuestion("tone", turns, options, "dark", ("light.jpg",)),
        ClosedQuestion("tone", turns, options, "pale", ("light.jpg",)),
        ClosedQuestion("again", (*turns, ("assistant", "dark"), ("human", "Sure?")), options, "dark", ("dark2.jpg",)),
    ]


def test_the_held_out_set_has_closed_questions_of_nine_kinds_and_an_even_majority() -> None:
    questions = read_closed_questions(TEST_DATA / "heldout.json")
    assert len(questions) == 140
    assert len({question.kind for question in questions}) == 9
    assert majority_accuracy(questions) == 0.5
    assert all(question.answer in question.options and question.turns[-1][0] == "human" for question in questions)


def test_the_demo_asks_in_words_that_training_has_seen() -> None:
    trained = {
        turn["value"].replace("<image>", "").strip()
        for record in json.loads((TEST_DATA / "data.json").read_text(encoding="utf-8"))
        for turn in record["conversations"]
    }
    recipe = (TEST_DATA.parent / "Makefile").read_text(encoding="utf-8")
    asked = [line.split('"')[1] for line in recipe.splitlines() if "composer-path ask" in line]
    assert len(asked) >= 2
    assert set(asked) <= trained


def test_the_demo_asks_about_tiles_that_training_has_not_seen() -> None:
    recipe = (TEST_DATA.parent / "Makefile").read_text(encoding="utf-8")
    tiles = [json.loads(line) for line in (TEST_DATA / "tiles.jsonl").read_text(encoding="utf-8").splitlines()]
    split = {tile["image"]: tile["split"] for tile in tiles}
    shown = [Path(word).name for word in recipe.split() if word.startswith("test_data/imgs/")]
    assert shown and all(split[name] == "heldout" for name in shown)


def test_records_come_as_a_list_or_as_lines_and_those_without_options_are_left_out(tmp_path: Path) -> None:
    records = json.loads((TEST_DATA / "heldout.json").read_text(encoding="utf-8"))
    lines = tmp_path / "heldout.jsonl"
    lines.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    assert read_closed_questions(lines) == read_closed_questions(TEST_DATA / "heldout.json")


def test_a_broken_record_is_named_by_place_and_never_quoted(tmp_path: Path) -> None:
    records = json.loads((TEST_DATA / "heldout.json").read_text(encoding="utf-8"))[:2]
    records[1]["conversations"][0]["from"] = "surprising"
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    with pytest.raises(ValueError, match=r"record 1: conversations\[0\].from.*unknown-role") as found:
        read_closed_questions(path)
    assert records[1]["conversations"][0]["value"] not in str(found.value)


@pytest.mark.parametrize(
    ("said", "options", "answer"),
    [
        ("H&E", ("H&E", "IHC"), "H&E"),
        ("  h&e. ", ("H&E", "IHC"), "H&E"),
        ("The stain is IHC.", ("H&E", "IHC"), "IHC"),
        ("Either H&E or IHC", ("H&E", "IHC"), None),
        ("stromal", ("nest", "stroma"), None),
        ("the stroma field", ("nest", "stroma"), "stroma"),
        ("", ("nest", "stroma"), None),
        ("B", ("A", "B"), "B"),
        ("B. the stroma field", ("A", "B"), "B"),
        ("(A)", ("A", "B"), "A"),
        ("A tile with tissue", ("A", "B"), None),
        ("It is a tile", ("A", "B"), None),
    ],
)
def test_an_answer_counts_when_it_names_one_option(said: str, options: tuple[str, ...], answer: str | None) -> None:
    assert parse_answer(said, options) == answer


def test_answers_are_counted_by_kind(questions: list[ClosedQuestion], tmp_path: Path) -> None:
    oracle = Oracle()
    result = evaluate_closed(oracle, questions, tmp_path)  # type: ignore[arg-type]
    assert [result.count("correct", kind) for kind in ("tone", "again", None)] == [2, 1, 3]
    assert [result.count("asked", kind) for kind in ("tone", "again", None)] == [3, 1, 4]
    assert oracle.asked[0] == (questions[0].turns, "One word.", 9)
    assert oracle.asked[-1][0][-1] == ("human", "Sure?")


def test_a_model_that_says_nothing_about_white_pictures_is_wrong_on_them(
    questions: list[ClosedQuestion], tmp_path: Path
) -> None:
    comparison = compare_with_blank(Oracle(), questions, tmp_path)  # type: ignore[arg-type]
    assert comparison["all"] == {
        "asked": 4,
        "majority": 0.75,
        "with_image": {"correct": 3, "unparsed": 0},
        "blank_image": {"correct": 0, "unparsed": 4},
    }
    assert comparison["kinds"]["tone"]["majority"] == 2 / 3
    assert list(comparison["kinds"]) == ["again", "tone"]


def test_answers_about_white_pictures_are_shared_only_where_all_that_is_asked_is_equal(
    questions: list[ClosedQuestion], tmp_path: Path
) -> None:
    """Two system messages, two numbers of pictures and two lengths of an answer are three further questions."""
    tone = questions[1]
    asked = [
        tone,
        dataclasses.replace(tone, answer="pale"),  # the same question: not asked again
        dataclasses.replace(tone, system="Say dark."),
        dataclasses.replace(tone, images=tone.images * 2),
        dataclasses.replace(tone, options=("dark", "pale as a sheet")),
    ]

    class Obedient(Oracle):
        def answer(self, turns: Any, images: Any, system: str | None, max_new_tokens: int) -> str:
            super().answer(turns, images, system, max_new_tokens)
            return "dark" if system else "pale"

    oracle = Obedient()
    result = evaluate_closed(oracle, asked, tmp_path, blank=True)  # type: ignore[arg-type]
    assert [(system, longest) for _, system, longest in oracle.asked] == [
        (None, 9),
        ("Say dark.", 9),
        (None, 9),
        (None, 12),
    ]
    assert result.count("asked") == 5 and result.count("correct") == 2  # the one told to, and "pale"


def test_pictures_of_a_few_batches_are_held_at_a_time(questions: list[ClosedQuestion], tmp_path: Path) -> None:
    oracle = Oracle()
    result = evaluate_closed(oracle, questions * 5, tmp_path, batch_size=1)  # type: ignore[arg-type]
    assert oracle.batches == [8, 8, 4] and result.count("asked") == 20 and result.count("correct") == 15


def test_a_question_that_cannot_be_asked_is_named_by_its_record(
    questions: list[ClosedQuestion], tmp_path: Path
) -> None:
    class Full(Oracle):
        def prompt(self, turns: Any, images: Any, *, system: str | None) -> Any:
            raise ValueError("the conversation takes 9 tokens of 8")

    asked = dataclasses.replace(questions[0], where="record 7")
    with pytest.raises(ValueError, match=r"^record 7: the conversation takes 9 tokens of 8"):
        evaluate_closed(Full(), [asked], tmp_path)  # type: ignore[arg-type]


def test_an_image_outside_of_the_folder_is_refused(questions: list[ClosedQuestion], tmp_path: Path) -> None:
    outside = ClosedQuestion("tone", questions[0].turns, ("dark", "pale"), "dark", ("../dark1.jpg",))
    with pytest.raises(ValueError, match="path-outside-folder"):
        evaluate_closed(Oracle(), [outside], tmp_path)  # type: ignore[arg-type]
