"""Why a record is refused: every rule, its place, what to do, and that errors keep secrets."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from tiny_records import answer, question, record

from composer_path.records.conversation import Conversation
from composer_path.records.rules import RULES, RecordError, problems_of


def rules_broken(value: object) -> list[str]:
    return [problem.rule for problem in problems_of(value)]


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ([1], "not-an-object"),
        (None, "not-an-object"),
        ({}, "missing-key"),
        (record(id=1.5), "wrong-type"),
        (record(id=True), "wrong-type"),
        (record(id=""), "wrong-type"),
        (record(image=""), "wrong-type"),
        (record(image=3), "wrong-type"),
        (record(image=["a.jpg", None]), "wrong-type"),
        (record(system=["a"]), "wrong-type"),
        (record(meta="a"), "wrong-type"),
        (record(mpp=0), "wrong-type"),
        (record(mpp=float("inf")), "wrong-type"),
        (record(mpp=float("nan")), "wrong-type"),
        (record(mpp=True), "wrong-type"),
        (record(stain=3), "wrong-type"),
        ({"conversations": ["a"]}, "wrong-type"),
        (record(question(), {"from": None, "value": "a"}), "wrong-type"),
        (record(question(), {"value": "a"}), "missing-key"),
        (record(question(), {"from": "Assistant", "value": "a"}), "unknown-role"),
        (record(answer()), "empty-conversation"),
        (record(answer(), answer(), question(), answer()), "repeated-role"),
        (record(question(), answer(), answer()), "repeated-role"),
        (record(question(), answer("\t \n")), "empty-answer"),
        (record(question(), answer("a <image> b"), image="a.jpg"), "tag-in-answer"),
        (record(answer("<image>"), question(), answer(), image="a.jpg"), "tag-in-answer"),
        (record(question("\udc80"), answer()), "not-utf8"),
        (record(meta={"a": ["\ud800"]}), "not-utf8"),
    ],
)
def test_a_record_that_breaks_one_rule_breaks_only_that_rule(value: object, rule: str) -> None:
    assert rules_broken(value) == [rule]
    with pytest.raises(RecordError) as caught:
        Conversation.from_record(value)
    assert caught.value.rule == rule
    assert isinstance(caught.value, ValueError)


def test_all_problems_of_a_record_are_listed_with_their_places() -> None:
    value = record(question("<image>"), answer(" "), question(), question(), answer("<image>"))
    places = {(problem.rule, problem.where) for problem in problems_of(value)}
    assert places == {
        ("empty-answer", "conversations[1].value"),
        ("repeated-role", "conversations[3]"),
        ("tag-in-answer", "conversations[4].value"),
        ("tag-count", "conversations"),
    }


def test_an_error_says_where_the_rule_what_was_found_and_what_to_do() -> None:
    with pytest.raises(RecordError) as caught:
        Conversation.from_record(record(question(), answer(), question()))
    assert str(caught.value.at("record 7")) == (
        "record 7: conversations[2]: the last turn must be from 'assistant', found 'human'; "
        "add the answer or leave the last question out [last-turn-not-assistant]"
    )


def test_an_error_survives_pickling() -> None:
    error = RecordError("tag-count", "tags: 2, images: 1", "give every image its tag", "conversations")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.rule) == (str(error), "tag-count")


def test_errors_never_hold_text_names_or_ids() -> None:
    secret = "Miller-4711"
    values: list[object] = [
        secret,
        [secret],
        record(question(secret), {"from": secret, "value": secret}, id=secret),
        record(question(secret), answer(secret), question(secret), id=secret, patient=secret),
        record(question(secret), answer(f"{secret} <image>"), image=secret),
        record(question(secret), question(secret), answer(" ")),
        record(question(secret), answer(secret), mpp=secret, meta=secret, patient=[secret], image={secret: 1}),
    ]
    for value in values:
        problems = problems_of(value)
        assert problems
        for problem in problems:
            assert secret not in f"{problem} {problem!r} {problem.args}"


def test_a_system_role_is_named_and_sent_to_its_key() -> None:
    turns = [{"from": "system", "value": "Be brief."}, question(), answer()]
    with pytest.raises(RecordError, match=r"found 'system'; put it under the record's key 'system'"):
        Conversation.from_record(record(*turns))


@pytest.mark.parametrize(
    ("image", "text"),
    [(None, "<image>"), ("a.jpg", "<image><image>"), (["a.jpg", "b.jpg"], "Which?"), (["a", "b"], "<image>")],
)
def test_other_numbers_of_tags_are_refused_with_both_counts(image: Any, text: str) -> None:
    num_images = len(image) if isinstance(image, list) else int(image is not None)
    with pytest.raises(RecordError, match=f"tags: {text.count('<image>')}, images: {num_images}") as caught:
        Conversation.from_record(record(question(text), answer(), image=image))
    assert caught.value.rule == "tag-count"


def test_every_rule_has_a_name_of_small_letters_and_a_sentence() -> None:
    assert RULES
    for rule, sentence in RULES.items():
        assert rule == rule.lower() and " " not in rule
        assert len(sentence.split()) > 3
