"""Keys that are meant for others, and keys whose names may be shown."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_records import answer, question, record

from composer_path.records.key_names import NOT_SHOWN, canonical, shown_identifier, shown_key
from composer_path.records.rules import problems_of

REGION = {"file": "a.svs", "x": 0, "y": 0, "width": 8, "height": 8}


def found(value: dict[str, Any]) -> list[tuple[str, str]]:
    return [(problem.rule, problem.where) for problem in problems_of(value)]


@pytest.mark.parametrize(
    "key",
    [
        "images",
        "image_path",
        "image_paths",
        "image_file",
        "imageFile",
        "Image",
        "IMAGE",
        "img",
        "imgs",
        "Img",
        "picture",
        "photo",
        "video",
        "figure_path",
        "image1",
        "image_url",
        "file_name",
        "filename",
        "input_image",
        "wsi",
        "tile_path",
        "iamge",
    ],
)
def test_a_picture_under_another_key_is_refused_with_the_right_one(key: str) -> None:
    (problem,) = problems_of(record(**{key: "a.png"}))
    assert problem.rule == "lookalike-key" and "did you mean 'image'?" in problem.fix
    assert found(record(**{key: ["a.png"]})) == [("lookalike-key", "")]


def test_a_picture_is_known_by_its_name_too_and_the_key_is_not_shown() -> None:
    (problem,) = problems_of(record(**{"Jane Miller": "4711.svs"}))
    assert problem.rule == "lookalike-key"
    assert "Jane" not in str(problem) and "4711" not in str(problem)


@pytest.mark.parametrize("value", [None, "", [], {}, False])
def test_a_key_of_no_content_is_no_lookalike(value: object) -> None:
    assert found(record(images=value, video=value, system_prompt=value)) == []


def test_another_word_beside_the_right_key_is_ignored_and_another_spelling_is_not() -> None:
    assert found(record(image="a.png", image_path="/data/a.png", text="a", num_images=1)) == []
    assert found(record(image="a.png", Image="b.png")) == [("lookalike-key", "")]
    assert found(record(stain="PAS", Stain="H&E")) == [("lookalike-key", "")]
    assert found(record(PATIENT="a")) == [("lookalike-key", "")]


@pytest.mark.parametrize("key", ["Conversations", "conversation", "messages", "text", "Conver_sations", "dialogue"])
def test_turns_under_another_key_are_one_problem(key: str) -> None:
    (problem,) = problems_of({key: [question(), answer()]})
    assert problem.rule == "lookalike-key" and "'conversations'" in problem.fix


@pytest.mark.parametrize("key", ["System", "system_prompt", "systemMessage", "sytem"])
def test_a_system_message_under_another_key_is_refused(key: str) -> None:
    assert found(record(**{key: "Be brief."})) == [("lookalike-key", "")]


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("From", "human", "from"),
        ("Loss", 0, "loss"),
        ("loss-mask", 0, "loss_mask"),
        ("masked", True, "loss_mask"),
        ("loss_weight", 0.5, "weight"),
        ("trainable", False, "train"),
        ("train_on_turn", False, "loss"),
        ("training", False, "loss"),
        ("noLoss", True, "loss"),
        ("label_mask", [0, 1], "loss"),
        ("image", "a.png", "image"),
        ("images", ["a.png"], "image"),
    ],
)
def test_a_key_of_a_turn_that_means_another_is_refused(key: str, value: object, meant: str) -> None:
    (problem,) = problems_of({"conversations": [question(), {**answer(), key: value}]})
    assert (problem.rule, problem.where) == ("lookalike-key", "conversations[1]")
    assert f"'{meant}'" in problem.fix


def test_a_flag_of_another_name_is_told_which_value_means_what() -> None:
    (problem,) = problems_of({"conversations": [question(), {**answer(), "masked": True}]})
    assert "false or 0 for an answer that is not to be learned" in problem.fix


def test_other_keys_of_a_turn_are_no_flags() -> None:
    turn = {**answer(), "label": "x", "mask_file": "x", "weighting": 1, "constraint": 0, "trainee": 1, "score": 0.5}
    assert problems_of({"conversations": [question(), turn]}) == []


@pytest.mark.parametrize(("key", "value"), [("loss", False), ("weight", 0.5), ("train", 0), ("loss_mask", [0, 1])])
def test_a_flag_of_a_whole_record_is_refused_unless_it_changes_nothing(key: str, value: object) -> None:
    (problem,) = problems_of(record(**{key: value}))
    assert problem.rule == "lookalike-key" and "each answer" in problem.fix
    assert problems_of(record(**{key: True})) == problems_of(record(**{key: None})) == []


def test_a_turn_of_another_layout_is_told_its_keys() -> None:
    problems = problems_of({"conversations": [{"role": "human", "content": "?"}, answer()]})
    assert {problem.fix.split("'")[1] for problem in problems} == {"from", "value"}


@pytest.mark.parametrize(
    ("changes", "rules"),
    [
        ({"w": 8, "width": None}, ["lookalike-key"]),
        ({"File": "b.svs"}, ["lookalike-key"]),
        ({"score": 1}, ["wrong-type"]),
        ({"x": 10**30}, ["wrong-type"]),
    ],
)
def test_other_keys_of_a_region_are_named(changes: dict[str, Any], rules: list[str]) -> None:
    problems = problems_of(record(image={**REGION, **changes}))
    assert [problem.rule for problem in problems] == rules
    key = next(iter(changes))
    assert f"'{key}'" in str(problems) or f"another key: {key}" in str(problems) or ".x" in str(problems)
    (problem,) = problems_of(record(image={**REGION, "Jane Miller": 1}))
    assert "Jane" not in str(problem) and NOT_SHOWN in str(problem)


HARMLESS = [
    "model",
    "questionType",
    "answer_type",
    "num_images",
    "split",
    "umls_ids",
    "image_2",
    "file_id",
    "(row number)",
]


@pytest.mark.parametrize("key", HARMLESS)
def test_a_key_of_harmless_words_is_shown(key: str) -> None:
    assert shown_key(key) == key


@pytest.mark.parametrize(
    "key",
    ["Miller", "MillerJane", "jane_miller", "model Miller", "4711", "score_20200101", "", "\x1b[31m", "n" * 50, "é"],
)
def test_a_key_that_may_be_a_name_is_not(key: str) -> None:
    assert shown_key(key) == NOT_SHOWN


def test_a_key_that_is_kept_anyway_is_shown_if_it_is_an_identifier() -> None:
    assert [shown_identifier(key) for key in ("ki67", "attending", "grade_2")] == ["ki67", "attending", "grade_2"]
    assert {shown_identifier(key) for key in ("Jane Miller", "id20200101", "a\u202eb", "", "-", "x" * 60)} == {
        NOT_SHOWN
    }


def test_spellings_are_one_key() -> None:
    assert {canonical(key) for key in ("PatientID", "patient_id", "PATIENT-id", "patient . Id", "\uff30atientID")} == {
        "patientid"
    }
