"""Asking a model: greedy answers are those of the training forward, and prompts are those of training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_imports import slow_libraries
from tiny_model import IMAGES, MAX_SEQ_LEN, NUM_IMAGE_TOKENS, tiny_model_folder

from composer_path.asking.assistant import Assistant
from composer_path.asking.sampling import Sampling
from composer_path.records.conversation import Conversation, Turn
from composer_path.records.tokenize import IGNORE_INDEX, IMAGE_TOKEN_ID, tokenize_conversation, tokenize_prompt

TILE = IMAGES / "cmu_x1120_y1960_160.jpg"
OTHER_TILE = IMAGES / "ihc_x0264_y0352_160.jpg"
QUESTION = "Which stain was used here, H&E or IHC?"


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    return Assistant.from_pretrained(tiny_model_folder(tmp_path_factory.getbasetemp() / "tiny_model"))


def test_a_greedy_answer_takes_the_likeliest_token_of_the_training_forward_at_each_step(assistant: Assistant) -> None:
    images = [assistant.read_image(TILE)]
    conversation = Conversation(turns=(Turn("human", f"<image>\n{QUESTION}"),), images=("",))
    ids = tokenize_prompt(conversation, assistant.tokenizer, "llava_llama_2", NUM_IMAGE_TOKENS)
    said = assistant.model.generate(ids, torch.stack(images), max_new_tokens=6, eos_token_id=None, pad_token_id=0)
    assert len(said) == 6
    for token in said.tolist():
        logits = assistant.model(
            input_ids=ids,
            position_ids=torch.arange(len(ids)),
            cu_seq_lens=torch.tensor([0, len(ids)], dtype=torch.int32),
            max_seq_len=len(ids),
            pixel_values=torch.stack(images),
            image_index=(ids == IMAGE_TOKEN_ID).nonzero()[:, 0],
            logits_index=torch.tensor([len(ids) - 1]),
        )
        assert int(logits[0].argmax()) == token
        ids = torch.cat([ids, torch.tensor([token])])


def test_the_same_question_about_another_image_or_another_order_gets_another_answer(assistant: Assistant) -> None:
    first, second = assistant.read_image(TILE), assistant.read_image(OTHER_TILE)
    answers = [
        assistant.answer([("human", QUESTION)], images, max_new_tokens=8)
        for images in ([], [first], [second], [first, second], [second, first])
    ]
    assert len(set(answers)) == len(answers)


def test_images_without_tags_stand_before_the_first_question(assistant: Assistant) -> None:
    images = [assistant.read_image(TILE), assistant.read_image(OTHER_TILE)]
    untagged = assistant.answer([("human", QUESTION)], images, max_new_tokens=8)
    tagged = assistant.answer([("human", f"<image>\n<image>\n{QUESTION}")], images, max_new_tokens=8)
    assert untagged == tagged


def test_earlier_turns_and_the_system_message_are_part_of_the_prompt(assistant: Assistant) -> None:
    alone = assistant.answer([("human", QUESTION)], max_new_tokens=8)
    later = [("human", "Hello."), ("assistant", "Hello."), ("human", QUESTION)]
    assert assistant.answer(later, max_new_tokens=8) != alone
    assert assistant.answer([("human", QUESTION)], system="Answer in one word.", max_new_tokens=8) != alone


def test_a_prompt_is_what_training_put_before_the_answer(assistant: Assistant) -> None:
    turns = (Turn("human", f"<image>\n{QUESTION}"), Turn("assistant", "H&E"), Turn("human", "Sure?"))
    asked = Conversation(turns=turns, images=("",))
    trained = Conversation(turns=(*turns, Turn("assistant", "Yes.")), images=("",))
    prompt = tokenize_prompt(asked, assistant.tokenizer, "llava_llama_2", NUM_IMAGE_TOKENS)
    tokens = tokenize_conversation(trained, assistant.tokenizer, "llava_llama_2", NUM_IMAGE_TOKENS)
    assert torch.equal(prompt, tokens.input_ids[: len(prompt)])
    assert (tokens.labels[len(prompt) :] != IGNORE_INDEX).all()


def test_an_answer_ends_at_the_token_that_training_put_at_its_end(assistant: Assistant) -> None:
    assert assistant.end_ids() == [assistant.tokenizer.eos_token_id]


def test_several_answers_at_once_are_those_of_one_after_the_other(assistant: Assistant) -> None:
    tiles = [assistant.read_image(TILE), assistant.read_image(OTHER_TILE)]
    told = [Turn("human", "Hello."), Turn("assistant", "Hello.")]
    asked: list[tuple[list[Turn], list[Any], str | None]] = [
        ([Turn("human", QUESTION)], tiles[:1], None),
        ([Turn("human", QUESTION)], tiles, None),
        ([Turn("human", f"Look at <image> first. {QUESTION}")], tiles[1:], "Answer in one word."),
        ([*told, Turn("human", QUESTION)], [], None),
    ]
    expected = [
        assistant.answer([(turn.role, turn.text) for turn in turns], images, system=system, max_new_tokens=12)
        for turns, images, system in asked
    ]
    prompts = [assistant.prompt(turns, images, system=system) for turns, images, system in asked]
    assistant.features.forget()
    before = assistant.features.num_encoded
    for batch_size in (1, 3, 8):
        assert assistant.answers(prompts, Sampling(12), batch_size=batch_size) == expected
    assert assistant.features.num_encoded == before + 2
    cut = assistant.answers(prompts[:2], [Sampling(12), Sampling(3)])
    assert cut[0] == expected[0] and cut[1] != expected[1] and expected[1].startswith(cut[1])
    assert assistant.answers([]) == []


def test_a_chat_encodes_each_picture_once_and_says_what_is_said_to_each_question_alone(assistant: Assistant) -> None:
    tiles = [assistant.read_image(TILE), assistant.read_image(OTHER_TILE)]
    assistant.features.forget()
    before, turns = assistant.features.num_encoded, [("human", QUESTION)]
    ends = {"eos_token_id": assistant.end_ids(), "pad_token_id": 0, "suppress_tokens": assistant.never_written}
    for further in ("Sure?", "And now?"):
        said = assistant.answer(turns, tiles, max_new_tokens=6)
        prompt = assistant.prompt([Turn(*turn) for turn in turns], tiles)
        new = assistant.model.generate(prompt.input_ids, torch.stack(tiles), max_new_tokens=6, **ends)
        assert said == assistant.tokenizer.decode(new, skip_special_tokens=True).strip()
        turns += [("assistant", said), ("human", further)]
    assert assistant.features.num_encoded == before + 2


def test_a_tokenizers_image_token_is_never_written(assistant: Assistant) -> None:
    model, prompt = assistant.model, assistant.prompt([Turn("human", QUESTION)])
    first = model.generate(prompt.input_ids, max_new_tokens=1, pad_token_id=0).item()
    tokenizer = copy.deepcopy(assistant.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    id = tokenizer.convert_tokens_to_ids("<image>")
    knowing = Assistant(model, tokenizer, assistant.text, assistant.images)
    assert knowing.never_written == [id]
    assert assistant.never_written in ([], [getattr(model, "image_token_id", None)])
    knowing.never_written = [first]  # as if the model wrote it
    said = knowing.answer([("human", QUESTION)], max_new_tokens=8)
    assert [said] == knowing.answers([prompt], Sampling(8)) != assistant.answers([prompt], Sampling(8))


def test_a_conversation_that_fills_the_context_is_refused(assistant: Assistant) -> None:
    with pytest.raises(ValueError, match=rf"takes \d+ tokens of {MAX_SEQ_LEN}; start a new one"):
        assistant.answer([("human", "nucleus " * MAX_SEQ_LEN)])


def test_tags_and_images_must_agree(assistant: Assistant) -> None:
    with pytest.raises(ValueError, match="1 image tags and the conversation 2 images"):
        assistant.answer([("human", "<image> What is it?")], [assistant.read_image(TILE)] * 2)


def test_an_image_that_cannot_be_read_is_named(assistant: Assistant, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    with pytest.raises(ValueError, match=r"image '.*notes\.txt': an image must decode, found 10 bytes"):
        assistant.read_image(text)
    with pytest.raises(ValueError, match=r"image '.*none\.jpg': there is no such file"):
        assistant.read_image(tmp_path / "none.jpg")
    with pytest.raises(ValueError, match="it is a folder"):
        assistant.read_image(tmp_path)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give the folder that composer-path export wrote"):
        Assistant.from_pretrained(tmp_path)


def test_asking_does_not_wait_for_composer_to_be_imported() -> None:
    assert not {"composer", "streaming"} & slow_libraries()["composer_path.asking.assistant"]


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    """A model that was trained on captions only."""
    return Assistant.from_pretrained(tiny_model_folder(tmp_path_factory.getbasetemp() / "tiny_captioner", "plain"))


def test_a_model_that_takes_no_question_refuses_one_by_name(captioner: Assistant) -> None:
    assert not captioner.takes_question
    with pytest.raises(ValueError, match="template 'plain', which takes no question"):
        captioner.answer([("human", QUESTION)], [captioner.read_image(TILE)])


def test_a_caption_is_what_the_training_prompt_leads_to(captioner: Assistant, assistant: Assistant) -> None:
    images = [captioner.read_image(TILE)]
    conversation = Conversation(turns=(Turn("human", "<image>"),), images=("",))
    prompt = tokenize_prompt(conversation, captioner.tokenizer, "plain", NUM_IMAGE_TOKENS)
    ends = {"eos_token_id": captioner.end_ids(), "pad_token_id": 0}
    expected = captioner.model.generate(prompt, torch.stack(images), max_new_tokens=8, **ends)
    said = captioner.caption(images, max_new_tokens=8)
    assert said == captioner.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert said != captioner.caption([captioner.read_image(OTHER_TILE)], max_new_tokens=8)
    assert captioner.answers([captioner.prompt([], images)], Sampling(8)) == [said]
    with pytest.raises(ValueError, match="a caption needs an image"):
        captioner.caption([])
    with pytest.raises(ValueError, match="a caption needs an image"):
        captioner.prompt([])
    with pytest.raises(ValueError, match="template 'plain', which takes no question"):
        captioner.prompt([Turn("human", QUESTION)], images)
    with pytest.raises(ValueError, match="takes a question; give one"):
        assistant.prompt([], images)
    with pytest.raises(ValueError, match="takes a question; give one"):
        assistant.caption(images)
