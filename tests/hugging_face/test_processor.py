"""An exported folder's processor, as users of transformers load it, asks what `composer-path ask` asks."""

from __future__ import annotations

import base64
import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import IMAGES, MAX_SEQ_LEN, NUM_IMAGE_TOKENS, tiny_model_folder
from tokenizer_fixtures import LLAMA2
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from composer_path.asking.assistant import Assistant
from composer_path.hugging_face.processor_folder import read_settings
from composer_path.images.pixels import normalize_image
from composer_path.records.conversation import Conversation, Turn
from composer_path.records.prompts import ChatTemplate
from composer_path.records.tokenize import IMAGE_TOKEN_ID, TextPreparation
from composer_path.records.vocabulary import text_encoder
from composer_path.run.export import write_model

PICTURES = sorted(IMAGES.iterdir())[:2]
QUESTION = "What organ is this </s>?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.getbasetemp() / "tiny_model")


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def assistant(folder: Path) -> Assistant:
    return Assistant.from_pretrained(folder, device="cpu")


def asked(*pictures: Any) -> list[dict[str, Any]]:
    """One question about pictures."""
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]


def trained(assistant: Assistant, processor: Any, count: int) -> list[int]:
    """The ids of training of that question."""
    turn = Turn("human", "<image>\n" * count + QUESTION)
    ids = assistant.text.prompt(Conversation((turn,), ("",) * count), assistant.tokenizer).tolist()
    return [processor.image_token_id if id == IMAGE_TOKEN_ID else id for id in ids]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_messages_and_their_text_give_the_ids_of_training(assistant: Assistant, processor: Any, count: int) -> None:
    messages = asked(*PICTURES[:count])
    expected = trained(assistant, processor, count)
    whole = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert whole["input_ids"].tolist() == [expected]
    said = processor.apply_chat_template(messages)
    again = processor(text=said, images=PICTURES[:count] or None, return_tensors="pt")
    assert again["input_ids"].tolist() == [expected]
    if count:
        assert torch.equal(again["pixel_values"], whole["pixel_values"])


def test_pixels_are_those_of_training_from_paths_bytes_pictures_and_data_urls(
    assistant: Assistant, processor: Any
) -> None:
    data = PICTURES[0].read_bytes()
    encoder = assistant.model.vision_encoder
    expected = normalize_image(assistant.images.load(data), mean=encoder.mean, std=encoder.std)
    url = {"url": "data:image/png;base64," + base64.b64encode(data).decode()}
    for picture in (str(PICTURES[0]), PICTURES[0], data, Image.open(PICTURES[0]), url):
        part = {"type": "image_url", "image_url": picture} if picture is url else {"type": "image", "image": picture}
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]
        found = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        assert torch.equal(found["pixel_values"][0], expected)


def test_a_picture_of_sixteen_bits_turned_by_exif_or_see_through_is_as_of_its_file(
    assistant: Assistant, processor: Any, tmp_path: Path
) -> None:
    rows = np.arange(40 * 30).reshape(40, 30)
    turned, seen = Image.Exif(), np.stack([rows % 256] * 4, -1).astype(np.uint8)
    turned[0x0112] = 6
    for name, picture, keywords in (
        ("deep.png", Image.fromarray((rows * 50).astype(np.uint16)), {}),
        ("turned.jpg", Image.fromarray(seen[..., :3]), {"exif": turned}),
        ("clear.png", Image.fromarray(seen), {}),
        ("cmyk.tif", Image.fromarray(seen, "CMYK"), {}),
    ):
        picture.save(tmp_path / name, **keywords)
        expected = assistant.images.load((tmp_path / name).read_bytes())
        encoder = assistant.model.vision_encoder
        found = processor.image_processor([[Image.open(tmp_path / name)]], return_tensors="pt")["pixel_values"][0]
        assert torch.equal(found, normalize_image(expected, mean=encoder.mean, std=encoder.std)), name


def test_several_texts_are_filled_up_on_the_left(assistant: Assistant, processor: Any) -> None:
    found = processor.apply_chat_template(
        [asked(PICTURES[0]), asked(*PICTURES)], tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    assert found["pixel_values"].shape[0] == 3
    for row, mask, count in zip(found["input_ids"], found["attention_mask"], (1, 2), strict=True):
        assert row[mask.bool()].tolist() == trained(assistant, processor, count)
        assert mask.tolist() == sorted(mask.tolist())


def test_what_the_model_was_not_trained_for_is_refused(processor: Any) -> None:
    said = processor.apply_chat_template(asked(*PICTURES))
    with pytest.raises(ValueError, match=r"2 times <image> and there are 1 images"):
        processor(text=said, images=PICTURES[:1])
    with pytest.raises(ValueError, match="'truncation' can't be set"):
        processor(text=said, images=PICTURES, truncation=True, max_length=4)
    with pytest.raises(ValueError, match="found an address"):
        processor.apply_chat_template(asked("http://127.0.0.1:9/a.png"), tokenize=True)
    with pytest.raises(ValueError, match="base64"):
        processor.apply_chat_template(asked("data:image/png;base64,%%"), tokenize=True)
    with pytest.raises(ValueError, match="'tools' must be left out"):
        processor.apply_chat_template(asked(), tools=[{"name": "x"}])


def test_images_of_a_prompt_are_counted_for_vllm(processor: Any) -> None:
    counts = processor._get_num_multimodal_tokens(image_sizes=[(9, 9), (8, 8)])
    assert counts["num_image_tokens"] == [NUM_IMAGE_TOKENS] * 2
    assert processor.replace_image_token({}, 0) == "<image>" * NUM_IMAGE_TOKENS
    types = processor(text="a <image> b", images=PICTURES[:1], return_mm_token_type_ids=True)["mm_token_type_ids"]
    assert sum(types) == NUM_IMAGE_TOKENS


def test_the_pipeline_says_what_ask_says(folder: Path, assistant: Assistant, processor: Any) -> None:
    expected = assistant.answer([("human", QUESTION)], [assistant.read_image(PICTURES[0])], max_new_tokens=8)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    ask: Any = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    said = ask(text=asked(str(PICTURES[0])), max_new_tokens=8, return_full_text=False, do_sample=False)
    assert said[0]["generated_text"] == expected


def test_the_pipeline_says_what_ask_says_with_the_tokenizers_own_chat_template(
    assistant: Assistant, tmp_path: Path
) -> None:
    tokenizer = copy.deepcopy(assistant.tokenizer)
    tokenizer.chat_template = LLAMA2
    text = TextPreparation(ChatTemplate(), NUM_IMAGE_TOKENS, MAX_SEQ_LEN)
    write_model(tmp_path, assistant.model, assistant.model.state_dict(), tokenizer, text, assistant.images)
    ours = Assistant.from_pretrained(tmp_path, device="cpu")
    expected = ours.answer([("human", QUESTION)], [ours.read_image(PICTURES[0])], max_new_tokens=8)
    assert expected != assistant.answer([("human", QUESTION)], [ours.read_image(PICTURES[0])], max_new_tokens=8)
    model, processor = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    ask: Any = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    said = ask(text=asked(str(PICTURES[0])), max_new_tokens=8, return_full_text=False)
    assert said[0]["generated_text"].strip() == expected


def test_a_saved_processor_is_the_same_and_we_read_it(processor: Any, folder: Path, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.chat_template == processor.chat_template
    messages = asked(*PICTURES)
    wanted, found = (
        one.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        for one in (processor, again)
    )
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[key], found[key]) for key in wanted)
    settings = read_settings(folder)
    assert read_settings(tmp_path) in (settings, settings | {"imports": []})


def test_a_template_of_the_users_own_is_rendered_and_read_as_it_is(processor: Any) -> None:
    """Then what is asked is the user's affair; what the model takes still fits together."""
    own = "{{ bos_token }}{% for message in messages %}Q: <image> {{ message['content'][-1]['text'] }} A:{% endfor %}"
    messages = [{"role": "user", "content": [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "?"}]}]
    said = processor.apply_chat_template(messages, own)
    assert said == "<s>Q: <image> ? A:"
    found = processor(text=said, images=PICTURES[:1], return_tensors="pt")
    image = [processor.image_token_id] * NUM_IMAGE_TOKENS
    encoder = text_encoder(processor.tokenizer)
    expected = [encoder.tokenizer.bos_token_id, *encoder.encode("Q: "), *image, *encoder.encode(" ? A:")]
    assert found["input_ids"][0].tolist() == expected
    assert len(found["pixel_values"]) == 1


def test_an_image_token_that_stands_as_often_as_an_image_takes_is_not_repeated_again(processor: Any) -> None:
    once, whole = "a <image> b<image>", "a {} b{}".format(*["<image>" * NUM_IMAGE_TOKENS] * 2)
    expected = processor(text=once, images=PICTURES)["input_ids"]
    assert expected.count(processor.image_token_id) == 2 * NUM_IMAGE_TOKENS
    assert processor(text=whole, images=PICTURES)["input_ids"] == expected
    assert processor(text=once)["input_ids"] == processor(text=whole)["input_ids"] == expected
    four = processor(text="<image>" * NUM_IMAGE_TOKENS, images=PICTURES[:1] * NUM_IMAGE_TOKENS)["input_ids"]
    assert four.count(processor.image_token_id) == NUM_IMAGE_TOKENS**2  # pictures side by side, one for each
    with pytest.raises(ValueError, match="the text has 3 times <image> and there are 2 images"):
        processor(text=f"{once}<image>", images=PICTURES)


def test_an_answer_ends_where_asks_does_and_a_full_conversation_is_refused(
    folder: Path, assistant: Assistant, processor: Any
) -> None:
    """Each row of a batch at its own length, which padding isn't part of."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    empty = len(assistant.prompt([Turn("human", "x")]).input_ids)
    texts = [" ".join(["x"] * (MAX_SEQ_LEN - empty - room)) for room in (5, 9)]
    rows = [[{"role": "user", "content": text}] for text in texts]
    inputs = processor.apply_chat_template(rows, tokenize=True, return_dict=True, return_tensors="pt", padding=True)
    new = model.generate(**inputs, max_new_tokens=40)[:, inputs["input_ids"].shape[1] :]
    rooms = [assistant.prompt([Turn("human", text)]).room for text in texts]
    assert rooms[0] < rooms[1] < 12 and new.shape[1] == rooms[1]
    for row, room, text in zip(new, rooms, texts, strict=True):
        said = assistant.tokenizer.decode(row[:room], skip_special_tokens=True).strip()
        assert said == assistant.answer([("human", text)], max_new_tokens=40)
    full = processor.apply_chat_template(asked(), tokenize=True, return_dict=True, return_tensors="pt")
    full = {key: value.repeat(1, MAX_SEQ_LEN) for key, value in full.items()}
    message = rf"the conversation takes {full['input_ids'].shape[1]} tokens of {MAX_SEQ_LEN}; start a new one"
    with pytest.raises(ValueError, match=message):
        model.generate(**full, max_new_tokens=1)
    with pytest.raises(ValueError, match=rf"the conversation takes \d+ tokens of {MAX_SEQ_LEN}; start a new one"):
        assistant.answer([("human", " ".join(["x"] * MAX_SEQ_LEN))])
