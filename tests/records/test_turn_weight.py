"""Flags of a turn: what each says, which contradict, and what a model learns then."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_records import answer, question, record

from composer_path.records.conversation import Conversation, Turn
from composer_path.records.rules import problems_of
from composer_path.records.tokenize import IGNORE_INDEX, tokenize_conversation
from composer_path.records.turn_weight import FLAGS


def flagged(**flags: Any) -> dict[str, Any]:
    return record(question(), {**answer("No."), **flags}, question(), answer("Yes."))


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_takes_a_turn_out_or_keeps_it(flag: str) -> None:
    for value in (False, 0, 0.0):
        assert Conversation.from_record(flagged(**{flag: value})).turns[1].weight == 0
    assert Conversation.from_record(flagged(**{flag: 0.5})).turns[1].weight == 0.5
    for value in (True, 1, 1.0, None):
        assert Conversation.from_record(flagged(**{flag: value})).turns[1].weight == 1


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        ({"loss": "false"}, "wrong-type"),
        ({"weight": -1}, "wrong-type"),
        ({"weight": 2}, "wrong-type"),
        ({"weight": 10**30}, "wrong-type"),
        ({"weight": float("nan")}, "wrong-type"),
        ({"loss_mask": [1, 0]}, "wrong-type"),
        ({"loss": True, "weight": 0}, "contradicting-flags"),
    ],
)
def test_a_flag_that_says_nothing_clear_is_refused(flags: dict[str, Any], rule: str) -> None:
    (problem,) = problems_of(flagged(**flags))
    assert problem.rule == rule and problem.where.startswith("conversations[1]")


def test_a_question_may_only_say_that_it_is_not_learned() -> None:
    assert problems_of(record({**question(), "loss": False}, answer())) == []
    (problem,) = problems_of(record({**question(), "weight": 1}, answer()))
    assert problem.rule == "loss-on-question"


def test_a_conversation_that_teaches_nothing_is_refused() -> None:
    for turns in ([question(), {**answer(), "loss": 0}], [answer(), question(), {**answer(), "train": False}]):
        (problem,) = problems_of(record(*turns))
        assert problem.rule == "nothing-learned"


def test_weights_go_through_shards_and_earlier_shards_are_read() -> None:
    conversation = Conversation.from_record(flagged(loss=False))
    stored = conversation.to_shard()
    assert [len(turn) for turn in stored["turns"]] == [2, 3, 2, 2]
    assert Conversation.from_shard(stored, 0).turns == conversation.turns
    assert Conversation.from_shard({"turns": [["human", "?"], ["assistant", "!"]]}, 0).turns[1].weight == 1
    with pytest.raises(ValueError, match="weight from 0 to 1"):
        Conversation.from_shard({"turns": [["human", "?"], ["assistant", "!", 7]]}, 0)


@pytest.mark.parametrize("template", ["llava_llama_2", "chat_template", "plain"])
def test_a_turn_of_weight_0_is_read_as_before_and_has_no_label(
    byte_level_tokenizer: Any, chat_templates: dict[str, str], template: str
) -> None:
    tokenizer = byte_level_tokenizer
    tokenizer.chat_template = chat_templates["chatml"]
    num_rounds = 1 if template == "plain" else 3
    turns = tuple(Turn(*turn) for turn in [("human", "Which?"), ("assistant", "A gland.")] * num_rounds)
    whole = tokenize_conversation(Conversation(turns), tokenizer, template, 1)
    silent = (turns[0], Turn("assistant", "A gland.", 0.0), *turns[2:])
    cut = tokenize_conversation(Conversation(silent), tokenizer, template, 1)
    assert cut.input_ids.equal(whole.input_ids)
    learned, left = whole.labels != IGNORE_INDEX, cut.labels != IGNORE_INDEX
    assert left.sum() * num_rounds == learned.sum() * (num_rounds - 1)
    first = int(learned.nonzero()[0]) + int(learned.sum()) // num_rounds
    assert not left[:first].any() and left[first:].equal(learned[first:])
