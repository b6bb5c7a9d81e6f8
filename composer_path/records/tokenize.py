"""Tokenization: a conversation becomes input ids with placeholders for images, and labels on the answers only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from composer_path.records.conversation import Conversation, Turn
from composer_path.records.prompts import PromptTemplate, get_template
from composer_path.records.segments import ImagePosition, ImageSlot, Segment, SpecialToken, Text
from composer_path.records.vocabulary import TextEncoder, Tokenizer, text_encoder

IMAGE_TOKEN_ID = -200  # the reference's placeholder; never in a vocabulary
IGNORE_INDEX = -100  # what torch's cross entropy leaves out

NumImageTokens = int | Sequence[int] | Callable[[int], int]


@dataclass(frozen=True)
class TokenizedConversation:
    """A conversation as the model reads it.

    Attributes:
        input_ids: Token ids; an image stands as `num_image_tokens` times IMAGE_TOKEN_ID.
        labels: The same ids where the model learns to write them (answers and their ends, but for turns of weight 0),
            IGNORE_INDEX elsewhere; not shifted.
        num_images: How many images were not cut away; always the first ones.
        truncated: Something was cut away at the end.
        weights: What each label counts in the loss; None where all count 1.
    """

    input_ids: Int64[Tensor, " tokens"]
    labels: Int64[Tensor, " tokens"]
    num_images: int
    truncated: bool = False
    weights: Float32[Tensor, " tokens"] | None = None

    @property
    def num_answer_tokens(self) -> int:
        """How many tokens have a label; 0 if the answers were all cut away."""
        return int(np.count_nonzero(self.labels.numpy() != IGNORE_INDEX))


@dataclass(frozen=True)
class TextPreparation:
    """How text is prepared for a model: the only way in which these settings travel.

    Args:
        template: What stands around the turns.
        num_image_tokens: Placeholders of an image: a number, one for each image, or a function of the image's index.
        max_seq_len: Longer conversations are cut at the end, images included, before an image that would not fit
            whole; None for no limit.
        image_position: `front` of its turn, or `inline` where its tag is.
    """

    template: PromptTemplate
    num_image_tokens: NumImageTokens
    max_seq_len: int | None = 4096
    image_position: ImagePosition = "front"

    def __post_init__(self) -> None:
        _position(self.image_position)
        if self.max_seq_len is not None and (type(self.max_seq_len) is not int or self.max_seq_len < 1):
            raise ValueError(f"max_seq_len: must be at least 1, and whole, found {self.max_seq_len!r}")

    def tokenize(self, conversation: Conversation, tokenizer: Tokenizer | TextEncoder) -> TokenizedConversation:
        """Turn a conversation that ends with an answer into input ids and labels.

        Raises:
            TemplateError: The template can't express this conversation.
            ValueError: Its turns don't alternate, the tokenizer lacks what the template needs, or counts don't fit.
        """
        _check_turns(conversation, last_role="assistant")
        return self._tokenize(conversation, text_encoder(tokenizer), self.max_seq_len)

    def prompt(self, conversation: Conversation, tokenizer: Tokenizer | TextEncoder) -> Int64[Tensor, " tokens"]:
        """Turn a conversation that ends with a question into input ids, up to where the answer starts; never cut.

        They are the start of what `tokenize` makes of the same conversation with an answer.
        """
        _check_turns(conversation, last_role="human")
        return self._tokenize(conversation, text_encoder(tokenizer), None).input_ids

    def end_id(self, tokenizer: Tokenizer | TextEncoder) -> int:
        """The token that a model learns to end its answers with."""
        labels = self.tokenize(Conversation(turns=(Turn("human", "?"), Turn("assistant", "!"))), tokenizer).labels
        return int(labels[labels != IGNORE_INDEX][-1])

    def end_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Tokens that end an answer: the one the template trains, and the tokenizer's own."""
        trained, own = self.end_id(tokenizer), tokenizer.eos_token_id
        return sorted({trained, own if own is not None else trained})

    def _tokenize(self, conversation: Conversation, encoder: TextEncoder, limit: int | None) -> TokenizedConversation:
        """1. Segments of the template. 2. Ids of each, with its mark as label. 3. Stop where the limit is reached."""
        segments = _joined(self.template.segments(conversation, encoder, self.image_position))
        num_slots = sum(isinstance(segment, ImageSlot) for segment in segments)
        if num_slots != conversation.num_images:
            raise ValueError(
                f"the questions hold {num_slots} image tags and the conversation {conversation.num_images} images; "
                "the two must be equal"
            )
        image_lengths = _image_lengths(self.num_image_tokens, num_slots)
        prefix_after_special = self.template.prefix_after_special or encoder.prefix_after_special
        input_ids: list[int] = []
        labels: list[int] = []
        weights: list[float] = []
        num_images, truncated = 0, False
        prefix = True  # the next text starts a new piece
        partial = any(turn.weight not in (0, 1) for turn in conversation.turns)
        for segment in segments:
            if isinstance(segment, ImageSlot):
                ids, weight = [IMAGE_TOKEN_ID] * image_lengths[num_images], 0.0
            else:
                ids = [segment.id] if isinstance(segment, SpecialToken) else encoder.encode(segment.text, prefix)
                weight = segment.weight if segment.supervised else 0.0
            prefix = not isinstance(segment, Text) and prefix_after_special
            room = len(ids) if limit is None else limit - len(input_ids)
            truncated = len(ids) > room
            if isinstance(segment, ImageSlot):
                ids = [] if truncated else ids
                num_images += not truncated
            ids = ids[:room]
            input_ids += ids
            labels += ids if weight else [IGNORE_INDEX] * len(ids)
            weights += [weight] * len(ids) if partial else []
            if truncated:
                break
        # Of lists numpy makes an array several times as fast as torch makes a tensor.
        ids_and_labels = torch.from_numpy(np.array([input_ids, labels], dtype=np.int64))
        counted = torch.tensor(weights, dtype=torch.float32) if partial else None
        return TokenizedConversation(ids_and_labels[0], ids_and_labels[1], num_images, truncated, counted)


def tokenize_conversation(
    conversation: Conversation,
    tokenizer: Tokenizer | TextEncoder,
    template: str | Mapping[str, Any] | PromptTemplate,
    num_image_tokens: NumImageTokens,
    max_seq_len: int | None = None,
    image_position: str = TextPreparation.image_position,
) -> TokenizedConversation:
    """`TextPreparation.tokenize` with the settings one by one; the template as `get_template` takes it."""
    text = TextPreparation(get_template(template), num_image_tokens, max_seq_len, _position(image_position))
    return text.tokenize(conversation, tokenizer)


def tokenize_prompt(
    conversation: Conversation,
    tokenizer: Tokenizer | TextEncoder,
    template: str | Mapping[str, Any] | PromptTemplate,
    num_image_tokens: NumImageTokens,
    image_position: str = TextPreparation.image_position,
) -> Int64[Tensor, " tokens"]:
    """`TextPreparation.prompt` with the settings one by one."""
    text = TextPreparation(get_template(template), num_image_tokens, None, _position(image_position))
    return text.prompt(conversation, tokenizer)


def _position(word: str) -> ImagePosition:
    for position in get_args(ImagePosition):
        if word == position:
            return position
    raise ValueError(f"image_position: must be 'front' or 'inline', found {word!r}")


def _joined(segments: list[Segment]) -> list[Segment]:
    """Join neighbouring texts of one kind, so that a tokenizer sees them as the one text they are."""
    joined: list[Segment] = []
    for _, group in groupby(segments, _kind):
        first, *others = group
        if not isinstance(first, Text):
            joined += [first, *others]
        elif text := first.text + "".join(segment.text for segment in others if isinstance(segment, Text)):
            joined.append(replace(first, text=text))
    return joined


def _kind(segment: Segment) -> tuple[bool, float] | None:
    """What neighbouring texts must share; a question's weight says nothing."""
    if not isinstance(segment, Text):
        return None
    return segment.supervised, segment.weight if segment.supervised else 1.0


def _image_lengths(num_image_tokens: NumImageTokens, num_images: int) -> list[int]:
    if callable(num_image_tokens):
        lengths = [num_image_tokens(index) for index in range(num_images)]
    else:
        lengths = [num_image_tokens] * num_images if isinstance(num_image_tokens, int) else list(num_image_tokens)
    if len(lengths) != num_images or any(length < 1 for length in lengths):
        raise ValueError(
            f"num_image_tokens: needs a count of at least 1 for each of the {num_images} images, found {lengths}"
        )
    return lengths


def _check_turns(conversation: Conversation, last_role: str) -> None:
    roles = [turn.role for turn in conversation.turns]
    if roles != ["human", "assistant"] * (len(roles) // 2) + ["human"] * (len(roles) % 2) or roles[-1:] != [last_role]:
        raise ValueError(
            f"turns must alternate, start with 'human' and end with {last_role!r}, found {', '.join(roles) or 'none'}"
        )
