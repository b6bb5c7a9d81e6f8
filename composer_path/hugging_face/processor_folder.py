"""The files of a processor in an exported folder: written, tried out and read here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from composer_path.hugging_face.chat_template import Writing, chat_template_of
from composer_path.hugging_face.image_processor import ComposerPathImageProcessor
from composer_path.hugging_face.processor import ComposerPathProcessor
from composer_path.images.pixels import ImagePreparation
from composer_path.own_parts.registry import sources_of
from composer_path.records.chat_template import TemplateError
from composer_path.records.conversation import Conversation, Turn
from composer_path.records.image_tags import IMAGE_TAG, tag_as_text
from composer_path.records.tokenize import IMAGE_TOKEN_ID, TextPreparation
from composer_path.records.vocabulary import TextEncoder, text_encoder
from composer_path.storage.json_object import read_json_object
from composer_path.weights.folder import write_json

PROCESSOR_CONFIG, IMAGE_CONFIG = "processor_config.json", "preprocessor_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
TEXT = ("image_position", "max_seq_len")
IMAGES = ("image_size", "fit", "decoder", "pad_color", "max_pixels", "scale_levels")
OF_A_PROCESSOR = {"processor_class", "image_token", "num_image_tokens", "template", "imports", *TEXT}


def write_processor(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    text: TextPreparation,
    images: ImagePreparation,
    image_token: str,
    normalization: tuple[Sequence[float], Sequence[float]],
) -> None:
    """Write how text and images are prepared, for us and for transformers, and the chat template.

    Args:
        folder: Of the model.
        tokenizer: With the image token.
        text: How text was prepared.
        images: How images were.
        image_token: Stands for an image.
        normalization: The encoder's mean and standard deviation.

    Raises:
        ValueError: The tokenizer's chat template can't be written so that its ids are those of training.
    """
    if not isinstance(text.num_image_tokens, int):
        raise ValueError("processor: each image must take as many tokens")
    settings: dict[str, Any] = {"processor_class": ComposerPathProcessor.__name__, "template": text.template.to_json()}
    settings |= {key: getattr(text, key) for key in TEXT}
    settings |= {"image_token": image_token, "num_image_tokens": text.num_image_tokens}
    if imports := sources_of(templates=text.template.name):
        settings["imports"] = imports
    of_images: dict[str, Any] = {key: getattr(images, key) for key in IMAGES}
    mean, std = map(list, normalization)
    of_images |= {"image_mean": mean, "image_std": std, "pad_color": list(images.pad_color)}
    template = tried_chat_template(text, tokenizer, image_token)
    of_images["processor_class"] = settings["processor_class"]
    write_json(folder / IMAGE_CONFIG, of_images | {"image_processor_type": ComposerPathImageProcessor.__name__})
    if template is not None:
        (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    write_json(folder / PROCESSOR_CONFIG, settings)


def tried_chat_template(text: TextPreparation, tokenizer: PreTrainedTokenizerBase, image_token: str) -> str | None:
    """The chat template with which a processor makes the ids of training, seen over many conversations, once.

    Raises:
        ValueError: There is none.
    """
    try:
        hash(text)
    except TypeError:  # a template of one's own that holds a list or a mapping: tried each time
        tried = _tried.__wrapped__
    else:
        tried = _tried
    return tried(text, tokenizer, image_token, len(tokenizer.added_tokens_decoder), repr(tokenizer.chat_template))


# A run writes its model many times, while all ranks wait. The last two tell whether the tokenizer was changed.
@lru_cache(maxsize=8)
def _tried(
    text: TextPreparation, tokenizer: PreTrainedTokenizerBase, image_token: str, num_added_tokens: int, own: str
) -> str | None:
    encoder = text_encoder(tokenizer)
    differs = ""
    for border, guard in ((False, False), (True, False), (False, True), (True, True)):
        template = chat_template_of(text, encoder, Writing(image_token, border, guard))
        if template is None:
            return None
        differs = first_difference(template, text, encoder, image_token)
        if not differs:
            return template
    raise ValueError(
        f"tokenizer: its chat template can't be handed on so that other programs make the ids of training; {differs}; "
        "train with template llava_llama_2, or another tokenizer"
    )


def first_difference(chat_template: str, text: TextPreparation, encoder: TextEncoder, image_token: str) -> str:
    """Where a chat template makes other ids than training did, in words; empty where it never does."""
    processor = ComposerPathProcessor.__new__(ComposerPathProcessor)  # what only makes ids needs no image processor
    processor.tokenizer, processor.image_token = encoder.tokenizer, image_token
    processor.image_token_id = encoder.special_tokens[image_token]
    processor.num_image_tokens, processor._prompt_template = 2, text.template
    text = replace(text, num_image_tokens=2)
    for conversation, messages, what in probes(list(encoder.special_tokens)):
        asking = conversation.turns[-1].role == "human"
        try:
            wanted = (text.prompt if asking else replace(text, max_seq_len=None).tokenize)(conversation, encoder)
        except TemplateError:  # such a conversation was never trained
            continue
        ids = (wanted if asking else wanted.input_ids).tolist()  # type: ignore[union-attr]
        rendered = render(chat_template, encoder.tokenizer, messages, asking)
        ids = [processor.image_token_id if id == IMAGE_TOKEN_ID else id for id in ids]
        if processor.ids_of(rendered) != ids:
            return f"it differs for {what}"
    return ""


def render(chat_template: str, tokenizer: Any, messages: list[dict[str, Any]], asking: bool) -> str:
    """A conversation as the template writes it."""
    return str(
        tokenizer.apply_chat_template(
            messages, chat_template=chat_template, tokenize=False, add_generation_prompt=asking
        )
    )


_WORDS = ("What is seen?", " blanks  at the ends \n", "Zellkerne, µm², 組織.", "(a) 1.5\n(b) -2]", "", "]", "x")


def probes(special: list[str]) -> Iterator[tuple[Conversation, list[dict[str, Any]], str]]:
    """Conversations as records and as messages, and what is particular about each."""
    words = [*_WORDS, *(f"It says {token} here{token}" for token in special[:4]), f"an {IMAGE_TAG} in words"]
    for at, word in enumerate(words):
        answers = [words[(at + step) % len(words)] or "-" for step in range(2)]
        for pictures, system in ((0, None), (1, "Be brief.")) if at else ((0, "Be brief."), (1, None), (2, None)):
            yield from _conversations(word, answers, pictures, system)


def _conversations(
    word: str, answers: list[str], pictures: int, system: str | None
) -> Iterator[tuple[Conversation, list[dict[str, Any]], str]]:
    images: list[dict[str, Any]] = [{"type": "image"}] * pictures
    first = "\n".join([IMAGE_TAG] * pictures + ([tag_as_text(word)] if word or not pictures else []))
    parts = [*images, *([{"type": "text", "text": word}] if word or not pictures else [])]
    turns = [Turn("human", first)]
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    what = f"{pictures} images, {'a' if system else 'no'} system message"
    yield Conversation(tuple(turns), ("",) * pictures, system=system), list(messages), f"one question, {what}"
    for answer in answers:
        turns += [Turn("assistant", answer), Turn("human", "And now?")]
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And now?"}]
    asked = Conversation(tuple(turns), ("",) * pictures, system=system)
    yield asked, list(messages), f"{len(answers) + 1} questions, {what}"
    answered = Conversation(tuple(turns[:-1]), ("",) * pictures, system=system)
    yield answered, messages[:-1], f"{len(answers)} answers, {what}"


def read_settings(folder: Path) -> dict[str, Any]:
    """What a folder's two files say, as one; of a folder of version 1 the first says all.

    Raises:
        ValueError: One isn't there, or isn't what an export writes.
    """
    found: dict[str, Any] = _read(folder / PROCESSOR_CONFIG)
    if "image_token" not in found:  # version 1
        return found
    nested = found.pop("image_processor", None)
    of_images = nested if isinstance(nested, dict) else _read(folder / IMAGE_CONFIG)
    if unknown := sorted(found.keys() - OF_A_PROCESSOR - _STOCK):
        raise ValueError(f"'{folder / PROCESSOR_CONFIG}': has unknown keys {unknown[:5]}; export the model again")
    found.pop("processor_class", None)
    return {key: found[key] for key in found if key in OF_A_PROCESSOR} | {
        key: of_images[key] for key in IMAGES if key in of_images
    }


_STOCK = {"auto_map", "transformers_version"}


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        fix = "give the folder that composer-path export wrote"
        raise ValueError(f"no {file.name} in '{file.parent}'; {fix}")
    return read_json_object(file)
