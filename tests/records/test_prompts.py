from __future__ import annotations

import copy
import datetime

import pytest

from composer_path.records.conversation import Conversation, Turn
from composer_path.records.prompts import (
    LLAVA_SYSTEM,
    ChatTemplate,
    LlavaLlama2Template,
    PlainTemplate,
    TemplateError,
    get_template,
)
from composer_path.records.segments import ImageSlot, SpecialToken, Text
from composer_path.records.vocabulary import load_tokenizer, text_encoder


def conversation(*texts: str, system: str | None = None) -> Conversation:
    turns = tuple(Turn("human" if index % 2 == 0 else "assistant", text) for index, text in enumerate(texts))
    num_images = sum(turn.text.count("<image>") for turn in turns if turn.role == "human")
    return Conversation(turns, images=("a.png",) * num_images, system=system)


@pytest.fixture
def mistral(mistral_tokenizer_path):
    return text_encoder(copy.deepcopy(load_tokenizer(mistral_tokenizer_path, use_fast=False)))


@pytest.fixture
def byte_level(byte_level_tokenizer):
    return text_encoder(byte_level_tokenizer)


def written(segments, encoder) -> str:
    """The segments as one text; what is supervised stands between « and »."""
    text = ""
    for segment in segments:
        if isinstance(segment, ImageSlot):
            text += "IMG"
            continue
        piece = (
            encoder.tokenizer.convert_ids_to_tokens(segment.id) if isinstance(segment, SpecialToken) else segment.text
        )
        text += f"«{piece}»" if segment.supervised else piece
    return text.replace("»«", "")


def test_plain_is_the_image_the_caption_and_a_newline(mistral):
    segments = PlainTemplate().segments(conversation("Describe.\n<image>", "Plasma cells."), mistral, "front")
    assert written(segments, mistral) == "<s>IMG«Plasma cells.\n»"


def test_plain_puts_several_images_line_by_line(mistral):
    two = conversation("<image> and <image>", "Nuclei.", system="ignored")
    assert written(PlainTemplate().segments(two, mistral, "inline"), mistral) == "<s>IMG\nIMG«Nuclei.\n»"


def test_plain_refuses_two_questions_without_printing_them(mistral):
    with pytest.raises(TemplateError, match="found 2 questions") as error:
        PlainTemplate().segments(conversation("secret one", "a", "secret two", "b"), mistral, "front")
    assert "secret" not in str(error.value)


def test_llava_llama_2_writes_the_references_format(mistral):
    segments = LlavaLlama2Template().segments(conversation("Q1\n<image>", "A1", "Q2", "A2"), mistral, "front")
    assert written(segments, mistral) == (
        f"<s>[INST] <<SYS>>\n{LLAVA_SYSTEM}\n<</SYS>>\n\nIMG\nQ1 [/INST]« A1 </s>»<s>[INST] Q2 [/INST]« A2 </s>»"
    )


@pytest.mark.parametrize(
    "of_record, of_template, expected",
    [("R", "T", "<<SYS>>\nR\n<</SYS>>\n\n"), (None, "T", "<<SYS>>\nT\n<</SYS>>\n\n"), (None, "", ""), ("", "T", "")],
)
def test_a_records_system_message_goes_before_the_templates(mistral, of_record, of_template, expected):
    segments = LlavaLlama2Template(system=of_template).segments(
        conversation("Q", "A", system=of_record), mistral, "front"
    )
    assert written(segments, mistral) == f"<s>[INST] {expected}Q [/INST]« A </s>»"


@pytest.mark.parametrize(
    "question, position, expected",
    [
        ("  Q  \n<image>", "front", "IMG\nQ"),
        ("a <image> b", "front", "IMG\na  b"),
        ("<image>", "front", "IMG"),
        ("  Q  ", "front", "  Q  "),
        ("A <image> or B <image>?", "front", "IMG\nIMG\nA  or B ?"),
        ("A <image> or B <image>?", "inline", "A IMG or B IMG?"),
        ("Q\n<image>", "inline", "Q\nIMG"),
        ("<im<image>age>", "front", "IMG\n<image>"),
    ],
)
def test_images_stand_in_front_of_their_turn_or_inline(mistral, question, position, expected):
    segments = LlavaLlama2Template(system="").segments(conversation(question, "A"), mistral, position)
    assert written(segments, mistral) == f"<s>[INST] {expected} [/INST]« A </s>»"
    assert sum(isinstance(segment, ImageSlot) for segment in segments) == question.count("<image>")


def test_a_tag_in_a_system_message_or_an_answer_is_text(mistral):
    segments = LlavaLlama2Template().segments(conversation("Q", "<image>", system="<image>"), mistral, "front")
    assert not any(isinstance(segment, ImageSlot) for segment in segments)


def test_a_tokenizer_without_an_end_token_is_refused_where_one_is_needed(mistral, byte_level):
    mistral.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token") as error:
        LlavaLlama2Template().segments(conversation("Q", "A"), mistral, "front")
    assert not isinstance(error.value, TemplateError)


def test_a_tokenizer_without_a_begin_token_starts_with_the_text(mistral):
    mistral.tokenizer.bos_token = None
    assert written(PlainTemplate().segments(conversation("Q", "A"), mistral, "front"), mistral) == "«A\n»"


def test_chatml_supervises_each_answer_and_its_end(byte_level, chat_templates):
    byte_level.tokenizer.chat_template = chat_templates["chatml"]
    segments = ChatTemplate().segments(conversation("<image>\nQ1", "A1", "Q2", "A2", system="S"), byte_level, "front")
    assert written(segments, byte_level) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nIMG\nQ1<|im_end|>\n<|im_start|>assistant\n«A1<|im_end|>»\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n«A2<|im_end|>»\n"
    )


def test_a_space_before_an_answer_belongs_to_the_answer(mistral, chat_templates):
    mistral.tokenizer.chat_template = chat_templates["llama2"]
    segments = ChatTemplate().segments(conversation("Q1", "A1", "Q2", "A2"), mistral, "front")
    assert written(segments, mistral) == "<s>[INST] Q1 [/INST]« A1 </s>»<s>[INST] Q2 [/INST]« A2 </s>»"
    asked = ChatTemplate().segments(conversation("Q1", "A1", "Q2"), mistral, "front")
    assert written(asked, mistral) == "<s>[INST] Q1 [/INST]« A1 </s>»<s>[INST] Q2 [/INST]"


def test_contents_are_trimmed_where_the_template_trims_them(byte_level, chat_templates):
    spaced = conversation("  Q\n", " A ", system=" S ")
    byte_level.tokenizer.chat_template = chat_templates["llama3"]
    text = written(ChatTemplate().segments(spaced, byte_level, "front"), byte_level)
    assert "\n\nS<|eot_id|>" in text and "\n\nQ<|eot_id|>" in text and "\n\n«A<|eot_id|>»" in text
    byte_level.tokenizer.chat_template = chat_templates["chatml"]
    text = written(ChatTemplate().segments(spaced, byte_level, "front"), byte_level)
    assert "user\n  Q\n<|im_end|>" in text and "assistant\n« A <|im_end|>»" in text


@pytest.mark.parametrize("date", ["26 Jul 2024", "2024-07-26", datetime.date(2024, 7, 26)])
def test_a_template_that_asks_for_the_date_gets_the_fixed_one(byte_level, chat_templates, date):
    byte_level.tokenizer.chat_template = chat_templates["llama3"]
    text = written(ChatTemplate(date=date).segments(conversation("Q", "A"), byte_level, "front"), byte_level)
    assert "Today Date: 26 Jul 2024\n" in text
    byte_level.tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + chat_templates["chatml"]
    text = written(ChatTemplate(date=date).segments(conversation("Q", "A"), byte_level, "front"), byte_level)
    assert text.startswith("2024-07-26<|im_start|>")


def test_without_a_given_date_it_is_still_not_today(byte_level, chat_templates):
    byte_level.tokenizer.chat_template = "{{ strftime_now('%Y') }}" + chat_templates["chatml"]
    text = written(ChatTemplate().segments(conversation("Q", "A"), byte_level, "front"), byte_level)
    assert text.startswith("2024<|im_start|>")


def test_a_date_that_can_not_be_fixed_is_refused(byte_level, chat_templates):
    template = "{% set form = '%Y' %}{{ strftime_now(form) }}" + chat_templates["chatml"]
    byte_level.tokenizer.chat_template = template
    with pytest.raises(ValueError, match="asks for today's date"):
        ChatTemplate().segments(conversation("Q", "A"), byte_level, "front")


def test_a_date_that_is_none_is_refused_when_the_template_is_made():
    with pytest.raises(ValueError, match=r"template\.date: found 'today'"):
        ChatTemplate(date="today")


def test_what_a_chat_template_refuses_is_told_without_the_conversation(mistral, chat_templates):
    mistral.tokenizer.chat_template = chat_templates["llama2"]
    with pytest.raises(TemplateError, match="no system messages") as error:
        ChatTemplate().segments(conversation("secret", "A", system="secret"), mistral, "front")
    assert "secret" not in str(error.value)


def test_a_chat_template_that_loses_or_repeats_a_message_is_refused(byte_level):
    only_last = "{{ messages[-1]['content'] }}<|im_end|>"
    twice = "{% for m in messages %}{{ m['content'] + m['content'] }}<|im_end|>{% endfor %}"
    turned = "{% for m in messages | reverse %}{{ m['content'] }}<|im_end|>{% endfor %}"
    for template in (only_last, twice, turned):
        byte_level.tokenizer.chat_template = template
        with pytest.raises(TemplateError, match="once and in order"):
            ChatTemplate().segments(conversation("Q", "A"), byte_level, "front")


def test_a_chat_template_without_an_end_after_the_answer_is_refused(byte_level):
    byte_level.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="no special token after an answer"):
        ChatTemplate().segments(conversation("Q", "A"), byte_level, "front")


def test_a_tokenizer_without_a_chat_template_is_told_so(mistral):
    with pytest.raises(ValueError, match="has no chat_template") as error:
        ChatTemplate().segments(conversation("Q", "A"), mistral, "front")
    assert not isinstance(error.value, TemplateError)


def test_templates_are_found_by_name_and_settings():
    assert get_template("plain") == PlainTemplate()
    assert get_template({"name": "llava_llama_2", "system": "S"}) == LlavaLlama2Template(system="S")
    assert get_template({"name": "chat_template", "date": "2024-07-26"}) == ChatTemplate(date="2024-07-26")
    assert get_template(template := ChatTemplate()) is template


def test_unknown_names_and_settings_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown name 'llama_2'; did you mean 'llava_llama_2'"):
        get_template("llama_2")
    with pytest.raises(ValueError, match=r"template\.system: 'plain' has no such setting"):
        get_template({"name": "plain", "system": "S"})
    with pytest.raises(
        ValueError, match=r"template\.sistem: 'chat_template' has no such setting \(it has: system, date, thinking\)"
    ):
        get_template({"name": "chat_template", "sistem": "S"})


THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
)
THOUGHTFUL = "<think>Rosettes.</think>Ependymoma."


@pytest.fixture
def thinker(byte_level):
    tokenizer = copy.deepcopy(byte_level.tokenizer)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = THINKING
    return text_encoder(tokenizer)


def test_thoughts_are_the_tokenizers_own_tokens_where_asked_for_and_in_answers_only(thinker):
    chat = conversation("What do <think> and </think> say?", THOUGHTFUL)
    marks = {thinker.special_tokens[mark] for mark in ("<think>", "</think>")}

    def learned(template: ChatTemplate) -> list[object]:
        return [
            getattr(one, "id", None) or one.text for one in template.segments(chat, thinker, "front") if one.supervised
        ]

    asked = learned(ChatTemplate(thinking=True))
    start, end = (thinker.special_tokens[mark] for mark in ("<think>", "</think>"))
    assert asked[:5] == ["", start, "Rosettes.", end, "Ependymoma."] and asked[5] not in marks
    assert THOUGHTFUL in learned(ChatTemplate())  # spelled out, as any text
    segments = ChatTemplate(thinking=True).segments(chat, thinker, "front")
    assert sum(isinstance(one, SpecialToken) and one.id in marks for one in segments) == 2  # the question's are text


def test_a_model_that_thinks_is_asked_without_the_templates_empty_thought(thinker):
    question = conversation("What is it?")
    asked, trained = (
        ChatTemplate(thinking=True).segments(one, thinker, "front")
        for one in (question, conversation("What is it?", THOUGHTFUL))
    )
    assert "think" not in written(asked, thinker) and trained[: len(asked)] == asked
    assert "<think>" in written(ChatTemplate().segments(question, thinker, "front"), thinker)


def test_thinking_needs_a_tokenizer_that_has_its_marks(byte_level):
    byte_level.tokenizer.chat_template = THINKING
    with pytest.raises(
        ValueError, match=r"template\.thinking: the tokenizer must have <think> and </think> as tokens, it la"
    ):
        ChatTemplate(thinking=True).segments(conversation("Q", "A"), byte_level, "front")
    with pytest.raises(ValueError, match=r"template\.thinking: found 'yes'; it must be true or false"):
        get_template({"name": "chat_template", "thinking": "yes"})


def test_text_segments_know_whether_they_are_supervised():
    assert Text("a") != Text("a", supervised=True)
