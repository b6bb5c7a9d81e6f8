"""Prompt templates: what stands around a conversation's turns, and which pieces the model learns to write.

A template turns a conversation into a list of segments: text, special tokens and images, each marked as supervised (an
answer and its end) or not. Labels follow from these marks, so no arithmetic on token counts is needed.

To add one: a subclass of `PromptTemplate` in a module that the YAML imports (docs/extending.md).
"""

from __future__ import annotations

import datetime
import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar

from composer_path.own_parts.registry import own_classes
from composer_path.records.chat_template import FIXED_DATE, TemplateError, read_date, render_around, trimmed
from composer_path.records.conversation import Conversation, Turn
from composer_path.records.image_tags import IMAGE_TAG
from composer_path.records.segments import (
    NO_THOUGHT,
    ImagePosition,
    Segments,
    SpecialToken,
    Text,
    answer_of,
    bos,
    image_row,
    question_of,
    template_text,
    thought_ids,
)
from composer_path.records.vocabulary import TextEncoder

# The system sentence that the reference's conversations start with (read from its token ids).
LLAVA_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True)
class PromptTemplate(ABC):
    """How a conversation is written for the language model."""

    name: ClassVar[str]
    # Whether a model that was trained with it can be asked a question; one without can only caption.
    takes_question: ClassVar[bool] = True
    # The reference tokenizes the text after each image or special token as a text of its own (in LLaMA's vocabulary:
    # with a leading space). False leaves it to the tokenizer.
    prefix_after_special: ClassVar[bool] = True

    @abstractmethod
    def segments(self, conversation: Conversation, encoder: TextEncoder, image_position: ImagePosition) -> Segments:
        """The conversation's segments; when its last turn is a question, they end where the answer starts.

        Raises:
            TemplateError: This template can't express the conversation.
            ValueError: The tokenizer lacks what this template needs.
        """

    def to_json(self) -> str | dict[str, Any]:
        """What `get_template` makes this template of: its name, with the settings that aren't the usual ones."""
        usual = {field.name: field.default for field in fields(self)}
        settings = {key: value for key, value in asdict(self).items() if value != usual[key]}
        return {"name": self.name, **settings} if settings else self.name


@dataclass(frozen=True)
class PlainTemplate(PromptTemplate):
    """Stage 1: the image, the caption, a newline. The question and a system message are dropped."""

    name: ClassVar[str] = "plain"
    takes_question: ClassVar[bool] = False

    def segments(self, conversation: Conversation, encoder: TextEncoder, image_position: ImagePosition) -> Segments:
        """See PromptTemplate; `image_position` changes nothing, as no text but the caption is left."""
        questions = [turn for turn in conversation.turns if turn.role == "human"]
        if len(questions) != 1:
            raise TemplateError(
                f"template 'plain' holds one question and its caption, found {len(questions)} questions; use "
                "'llava_llama_2' or 'chat_template' for conversations"
            )
        captions = [
            Text(turn.text + "\n", True, turn.weight) for turn in conversation.turns if turn.role == "assistant"
        ]
        images = image_row(questions[0].text.count(IMAGE_TAG))
        return [*bos(encoder), *images, *captions]


@dataclass(frozen=True)
class LlavaLlama2Template(PromptTemplate):
    """Stage 2: LLaMA-2's chat format with the reference's system sentence.

    Args:
        system: The system message of conversations that have none; an empty one (or null) leaves the system block out.
    """

    system: str | None = LLAVA_SYSTEM

    name: ClassVar[str] = "llava_llama_2"

    def segments(self, conversation: Conversation, encoder: TextEncoder, image_position: ImagePosition) -> Segments:
        """See PromptTemplate. Each answer is supervised with the spaces around it and the end-of-sequence token."""
        eos_id = encoder.tokenizer.eos_token_id
        if eos_id is None:
            raise ValueError(
                "template 'llava_llama_2' ends each answer with the end-of-sequence token, and this tokenizer has "
                "none; set eos_token in its tokenizer_config.json"
            )
        system = self.system if conversation.system is None else conversation.system
        opening = f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n" if system else "[INST] "
        segments: Segments = []
        for turn in conversation.turns:
            if turn.role == "human":
                question = question_of(turn.text, image_position)
                segments += [*bos(encoder), Text(opening), *question, Text(" [/INST]")]
                opening = "[INST] "
            else:
                # The space before the answer is its first token's, in any vocabulary: supervised like the answer.
                segments += [Text(f" {turn.text} ", True, turn.weight), SpecialToken(eos_id, True, turn.weight)]
        return segments


@dataclass(frozen=True)
class ChatTemplate(PromptTemplate):
    """The tokenizer's own chat template. Supervised are each answer and what follows it, up to the first special token.

    Args:
        system: The system message of conversations that have none; without it the template's own default stands.
        date: What the template gets when it asks for today's date ("26 Jul 2024" or "2024-07-26").
        thinking: Where an answer says `<think>` or `</think>`, these become the tokenizer's own tokens, supervised like
            the answer; else they are spelled out. The empty block that such templates put before an answer without
            thoughts is left out, so that the model itself decides.
    """

    system: str | None = None
    date: str | datetime.date = FIXED_DATE
    thinking: bool = False

    name: ClassVar[str] = "chat_template"
    prefix_after_special: ClassVar[bool] = False

    def __post_init__(self) -> None:
        read_date(self.date)

    def segments(self, conversation: Conversation, encoder: TextEncoder, image_position: ImagePosition) -> Segments:
        """See PromptTemplate."""
        system = self.system if conversation.system is None else conversation.system
        turns = list(conversation.turns)
        asking = turns[-1].role == "human"
        if asking:
            # Cut where the answer would start: what is asked is then exactly the start of what was trained.
            turns.append(Turn("assistant", ""))
        messages = [("user" if turn.role == "human" else "assistant", turn) for turn in turns]
        if system is not None:
            messages.insert(0, ("system", Turn("system", system)))
        chunks, trims = render_around([role for role, _ in messages], encoder.tokenizer, self.date)
        thoughts = thought_ids(encoder) if self.thinking else {}

        segments: Segments = []
        before: Turn | None = None  # the answer that stands before a chunk, so that its end is supervised
        for chunk, trim, (role, turn) in zip(chunks, trims, messages, strict=False):
            text = trimmed(turn.text, trim)
            if role == "assistant":
                chunk = NO_THOUGHT.sub("", chunk) if self.thinking else chunk
                if chunk.endswith(" "):
                    chunk, text = chunk[:-1], " " + text
            segments += template_text(chunk, encoder, before)
            if role == "user":
                segments += question_of(text, image_position)
            else:
                segments += answer_of(text, turn.weight, thoughts) if role == "assistant" else [Text(text)]
            before = turn if role == "assistant" else None
        if asking:  # the empty answer's text, which is all that there is of it
            return segments[:-1]
        return segments + template_text(chunks[-1], encoder, before)


TEMPLATES: dict[str, type[PromptTemplate]] = {
    one.name: one for one in (PlainTemplate, LlavaLlama2Template, ChatTemplate)
}


def get_template(template: str | Mapping[str, Any] | PromptTemplate) -> PromptTemplate:
    """A template by name, or by name and its settings, such as `{"name": "llava_llama_2", "system": "…"}`."""
    if isinstance(template, PromptTemplate):
        return template
    settings = {"name": template} if isinstance(template, str) else dict(template)
    name = settings.pop("name", None)
    known = TEMPLATES | own_classes("templates")
    if not isinstance(name, str) or name not in known:
        nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
        raise ValueError(f"template: unknown name {name!r}; did you mean {nearest!r}? (known: {', '.join(known)})")
    allowed = [field.name for field in fields(known[name])]
    required = [field.name for field in fields(known[name]) if field.default is MISSING and field.name not in settings]
    if required:
        raise ValueError(f"template.{required[0]}: is missing; {name!r} needs it")
    for key, value in settings.items():
        if key not in allowed:
            raise ValueError(f"template.{key}: {name!r} has no such setting (it has: {', '.join(allowed) or 'none'})")
        wanted, words = (bool, "true or false") if key == "thinking" else (str | datetime.date | None, "text, or null")
        if name in TEMPLATES and not isinstance(value, wanted):
            raise ValueError(f"template.{key}: found {value!r}; it must be {words}")
    return known[name](**settings)
