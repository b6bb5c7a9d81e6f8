"""Messages become the conversation that a record of messages becomes, and what is spelled out in them is text."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from composer_path.layouts.conversations import messages as layout_of_messages
from composer_path.layouts.row import Row
from composer_path.records.conversation import Conversation, Turn
from composer_path.records.image_tags import IMAGE_TAG
from composer_path.records.messages import MessageError, conversation_of, read_messages
from composer_path.records.prompts import get_template
from composer_path.records.tokenize import IMAGE_TOKEN_ID, TextPreparation
from composer_path.records.vocabulary import load_tokenizer

IMAGE = {"type": "image_url", "image_url": {"url": "a.jpg"}}
SEVERAL_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "First"}, IMAGE, {"type": "text", "text": "and"}, IMAGE]},
    {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    {"role": "user", "content": "Sure?"},
]


def test_messages_are_the_conversation_that_a_record_of_messages_is() -> None:
    answered = [*SEVERAL_TURNS, {"role": "assistant", "content": "Yes."}]
    images = [{"type": "image", "path": "a.jpg"}, {"type": "image", "path": "a.jpg"}]
    record = [dict(message) for message in answered]
    record[1] = record[1] | {"content": [{"type": "text", "text": "First"}, images[0], {"type": "text", "text": "and"}]}
    record[1]["content"].append(images[1])
    expected = Conversation.from_record(layout_of_messages(Row({"messages": record}), []))
    asked = read_messages(answered)
    assert asked.turns == expected.turns and asked.system == expected.system == "Be brief."
    assert asked.turns[0].text == f"First\n{IMAGE_TAG}\nand\n{IMAGE_TAG}"
    assert [picture["image_url"]["url"] for picture in asked.pictures] == ["a.jpg", "a.jpg"]


@pytest.mark.parametrize("template", ["llava_llama_2", "chat_template"])
@pytest.mark.parametrize("position", ["front", "inline"])
def test_a_tag_that_a_part_spells_out_is_text_and_no_image(
    template: str, position: Any, mistral_tokenizer_path: Any
) -> None:
    tokenizer = copy.deepcopy(load_tokenizer(mistral_tokenizer_path))
    tokenizer.chat_template = "{{bos_token}}{% for m in messages %}{{m['content']}}{{eos_token}}{% endfor %}"
    text = TextPreparation(get_template(template), 3, None, position)
    question = "Why is it written <image> and </s> here?"
    asked = read_messages([{"role": "user", "content": [IMAGE, {"type": "text", "text": question}]}])
    prompt = text.prompt(conversation_of(asked.turns, 1, asked.system), tokenizer)
    assert int((prompt == IMAGE_TOKEN_ID).sum()) == 3
    written = tokenizer.decode([id for id in prompt.tolist() if id >= 0])
    assert "written <image> and </s> here" in written and "\0" not in written
    other = read_messages([{"role": "user", "content": [IMAGE, {"type": "text", "text": "Why is it written?"}]}])
    plain = text.prompt(conversation_of(other.turns, 1, other.system), tokenizer)
    count = plain.tolist().count(tokenizer.eos_token_id)
    assert prompt.tolist().count(tokenizer.eos_token_id) == count  # the spelled-out one is no token


def test_tags_of_a_string_are_tags_and_images_without_any_stand_before_the_first_question() -> None:
    asked = read_messages([{"role": "user", "content": f"What is {IMAGE_TAG}?"}])
    assert asked.pictures == () and conversation_of(asked.turns, 1).turns[0].text == f"What is {IMAGE_TAG}?"
    told = [Turn("human", "What?"), Turn("assistant", "This."), Turn("human", "Sure?")]
    assert [turn.text for turn in conversation_of(told, 2).turns] == ["<image>\n<image>\nWhat?", "This.", "Sure?"]


SECRET = "Jane Doe"
USER = {"role": "user", "content": SECRET}


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (SECRET, "must be a list of messages"),
        ([], "must be a list of messages; found an empty list"),
        ([SECRET], r"messages\[0\]: must be an object"),
        ([{"role": "user"}], r"messages\[0\]: must have role and content; found no content"),
        ([{"content": SECRET}], "found no role"),
        ([{"role": "user", "content": []}], "found no content"),
        ([{"role": "user", "content": 5}], "must be a string or a list of parts"),
        ([{"role": SECRET, "content": ""}], r"messages\[0\].role: must be user or assistant"),
        ([{"role": ["user"], "content": ""}], r"messages\[0\].role: must be user or assistant"),
        ([USER, {"role": "tool", "content": SECRET}], r"messages\[1\].role: must be user or assistant"),
        ([USER, {"role": "system", "content": SECRET}], "found a later system message"),
        ([{"role": "assistant", "content": SECRET}], "must take turns, the user first"),
        ([USER, USER], r"messages\[1\].role: user and assistant must take turns"),
        ([{"role": "system", "content": SECRET}], "found a system message only"),
        ([USER | {"name": SECRET}], "must have role and content only; found 1 other keys"),
        ([USER, {"role": "assistant", "content": SECRET, "tool_calls": [{}]}], "found a tool's call"),
        ([{"role": "user", "content": [{"type": SECRET}]}], r"content\[0\].type: must be text or image_url"),
        ([{"role": "user", "content": [SECRET]}], r"content\[0\].type"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "must have a text that is a string"),
        ([{"role": "user", "content": [{"type": "text", "text": SECRET, "more": 1}]}], "and no more"),
        ([USER, {"role": "assistant", "content": [IMAGE]}], "images stand in messages of the user"),
        ([{"role": "user", "content": f"{SECRET}\0"}], "without NUL"),
        ([{"role": "user", "content": [{"type": "text", "text": f"{SECRET}\ud800"}]}], "UTF-8 can hold"),
        (
            [
                {"role": "user", "content": [IMAGE]},
                {"role": "assistant", "content": "a"},
                {"role": "user", "content": "<image>"},
            ],
            "<image> in a string must not stand beside image parts",
        ),
    ],
)
def test_other_messages_are_refused_with_their_place_and_without_their_text(messages: Any, said: str) -> None:
    with pytest.raises(MessageError, match=said) as found:
        read_messages(messages)
    assert SECRET not in str(found.value)


def test_a_tag_that_an_answer_spells_out_is_no_place_of_an_image() -> None:
    turns = [Turn("human", "What?"), Turn("assistant", f"an {IMAGE_TAG}"), Turn("human", "And now?")]
    asked = conversation_of(turns, 1)
    assert [turn.text for turn in asked.turns] == [f"{IMAGE_TAG}\nWhat?", f"an {IMAGE_TAG}", "And now?"]


@pytest.mark.parametrize(("question", "system"), [("a\udcffb", None), ("a", "\ud800")])
def test_a_text_that_no_tokenizer_can_read_is_refused(question: str, system: str | None) -> None:
    with pytest.raises(MessageError, match="must be text that UTF-8 can hold; found another character"):
        conversation_of([Turn("human", question)], 0, system)
