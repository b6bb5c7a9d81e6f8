"""The pieces that a prompt template makes of a conversation: text, special tokens and images, supervised or not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from composer_path.records.conversation import Turn
from composer_path.records.image_tags import IMAGE_TAG, as_written
from composer_path.records.vocabulary import TextEncoder

ImagePosition = Literal["front", "inline"]  # of an image: in front of its turn's text, or where its tag stands


@dataclass(frozen=True)
class Text:
    """A piece of text, part of an answer (supervised) or not; neighbours of one kind are tokenized as one text."""

    text: str
    supervised: bool = False
    weight: float = 1.0  # what each token counts in the loss where it is supervised


@dataclass(frozen=True)
class SpecialToken:
    """One special token, by id."""

    id: int
    supervised: bool = False
    weight: float = 1.0


@dataclass(frozen=True)
class ImageSlot:
    """Where the conversation's next image stands."""


Segment = Text | SpecialToken | ImageSlot
Segments = list[Segment]


_THOUGHT = re.compile("(</?think>)")
NO_THOUGHT = re.compile(r"<think>\s*</think>\s*\Z")


def bos(encoder: TextEncoder) -> Segments:
    """The beginning-of-sequence token, of a tokenizer that has one."""
    id = encoder.tokenizer.bos_token_id
    return [] if id is None else [SpecialToken(id)]


def question_of(text: str, image_position: ImagePosition) -> Segments:
    """A human turn with its images: in front of the text (one as in the reference, several line by line), or inline."""
    parts = text.split(IMAGE_TAG)
    if len(parts) == 1 or image_position == "inline":
        first, *others = map(as_written, parts)
        return [Text(first), *(segment for part in others for segment in (ImageSlot(), Text(part)))]
    rest = as_written("".join(parts)).strip()
    return [*image_row(len(parts) - 1), *([Text("\n" + rest)] if rest else [])]


def image_row(num_images: int) -> Segments:
    """Images in order with a newline between them."""
    return [ImageSlot() if index % 2 == 0 else Text("\n") for index in range(2 * num_images - 1)]


def thought_ids(encoder: TextEncoder) -> dict[str, int]:
    """The ids of the marks around a thought."""
    marks = ("<think>", "</think>")
    if lacking := [mark for mark in marks if mark not in encoder.special_tokens]:
        raise ValueError(
            f"template.thinking: the tokenizer must have {' and '.join(marks)} as tokens, it lacks "
            f"{' and '.join(lacking)}; take a model that thinks, or leave thinking out"
        )
    return {mark: encoder.special_tokens[mark] for mark in marks}


def answer_of(text: str, weight: float, thoughts: Mapping[str, int]) -> Segments:
    """An answer, its marks of thoughts as tokens where they are asked for."""
    if not thoughts:
        return [Text(text, True, weight)]
    parts = _THOUGHT.split(text)  # a text before each mark, and one after the last
    return [
        SpecialToken(thoughts[part], True, weight) if part in thoughts else Text(part, True, weight) for part in parts
    ]


def template_text(chunk: str, encoder: TextEncoder, answer: Turn | None) -> Segments:
    """What a chat template wrote itself; supervised up to its first special token if an answer stands before it."""
    segments: Segments = []
    for part in encoder.split_special_tokens(chunk):
        weight = 1.0 if answer is None else answer.weight
        if isinstance(part, int):
            segments.append(SpecialToken(part, answer is not None, weight))
            answer = None
        else:
            segments.append(Text(part, answer is not None, weight))
    if answer is not None:
        raise ValueError(
            "the tokenizer's chat template puts no special token after an answer, so a model could not learn to stop; "
            "add one (such as eos_token) to the template, or use 'llava_llama_2'"
        )
    return segments
