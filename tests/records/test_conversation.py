"""Conversations of records and of shards: turns, images and tags, and what else is kept."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_records import answer, question, record

from composer_path.records.conversation import Conversation, Turn, id_of


def test_user_and_gpt_mean_human_and_assistant() -> None:
    turns = [{"from": "user", "value": "Which stain?"}, {"from": "gpt", "value": "PAS."}]
    conversation = Conversation.from_record(record(*turns))
    assert conversation.turns == (Turn("human", "Which stain?"), Turn("assistant", "PAS."))


def test_text_is_kept_as_it_is_written() -> None:
    conversation = Conversation.from_record(record(question("  a \n<image>"), answer(" b\n "), image="a.jpg"))
    assert [turn.text for turn in conversation.turns] == ["  a \n<image>", " b\n "]


def test_a_leading_assistant_turn_is_dropped_and_counted() -> None:
    conversation = Conversation.from_record(record(answer("Hello."), question(), answer()))
    assert conversation.dropped_turns == 1
    assert [turn.role for turn in conversation.turns] == ["human", "assistant"]
    assert Conversation.from_record(record()).dropped_turns == 0


def test_one_image_without_a_tag_stands_before_the_first_question() -> None:
    conversation = Conversation.from_record(record(question(), answer(), question(), answer(), image="a.jpg"))
    assert conversation.image_without_tag
    assert conversation.turns[0].text == "<image>\nWhich stain?"
    assert conversation.turns[2].text == "Which stain?"


@pytest.mark.parametrize(
    ("image", "texts", "num_images"),
    [
        (None, ["Why?"], 0),
        ([], ["Why?"], 0),
        ("a.jpg", ["<image>\nWhy?"], 1),
        (["a.jpg"], ["Why?"], 1),
        (["a.jpg", "b.jpg"], ["<image>\n<image>\nWhich?"], 2),
        (["a.jpg", "b.jpg"], ["<image>What?", "And now? <image>"], 2),
    ],
)
def test_images_and_tags_go_together(image: Any, texts: list[str], num_images: int) -> None:
    turns = [turn for text in texts for turn in (question(text), answer())]
    conversation = Conversation.from_record(record(*turns, image=image))
    assert conversation.num_images == len(conversation.images) == num_images
    assert sum(turn.text.count("<image>") for turn in conversation.turns) == num_images


def test_optional_keys_are_kept_and_null_counts_as_absent() -> None:
    given = {"organ": "kidney", "stain": "PAS", "mpp": 0.25, "magnification": 40, "meta": {"a": [1]}}
    conversation = Conversation.from_record(
        record(id=7, patient=12, system="Be brief.", source=None, image=None, **given)
    )
    assert conversation.metadata == {**given, "patient": "12"}
    assert (conversation.id, conversation.system, conversation.images) == ("7", "Be brief.", ())
    assert Conversation.from_record(record()).id is None


def test_keys_that_nothing_reads_are_ignored() -> None:
    turns = [{**question(), "score": 1}, answer()]
    assert Conversation.from_record(record(*turns, model="", split="train")).metadata == {}


def test_a_conversation_comes_back_from_a_shard() -> None:
    conversation = Conversation.from_record(record(question("<image>\nWhy?"), answer(), image="a.jpg", system="S"))
    restored = Conversation.from_shard(conversation.to_shard(), num_images=1)
    assert (restored.turns, restored.system, restored.num_images) == (conversation.turns, "S", 1)
    with pytest.raises(ValueError, match="1 tags and 2 images"):
        Conversation.from_shard(conversation.to_shard(), num_images=2)


def test_an_id_is_read_even_from_a_record_that_is_refused() -> None:
    assert id_of({"id": 3}) == "3"
    assert id_of({"id": True}) is id_of({"id": ""}) is id_of(["id"]) is None
