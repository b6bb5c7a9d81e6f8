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
from typing import Any, ClassVar, Literal

from composer_path.own_parts.registry import own_classes
from composer_path.records.chat_template import FIXED_DATE, TemplateError, read_date, render_around, trimmed
from composer_path.records.conversation import Conversation, Turn
from composer_path.records.rules import IMAGE_TAG
from composer_path.records.vocabulary import TextEncoder

ImagePosition = Literal["front", "inline"]  # of an image: in front of its turn's text, or where its tag stands

# The system sentence that the reference's conversations start with (read from its token ids).
LLAVA_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True)
class Text:
    """A piece of text. Neighbours with the same mark are tokenized as one text."""

    text: str
    supervised: bool = False


@dataclass(frozen=True)
class SpecialToken:
    """One special token, by id."""

    id: int
    supervised: bool = False


@dataclass(frozen=True)
class ImageSlot:
    """Where the conversation's next image stands."""


Segment = Text | SpecialToken | ImageSlot
Segments = list[Segment]


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
        captions = [turn.text + "\n" for turn in conversation.turns if turn.role == "assistant"]
        images = _image_row(questions[0].text.count(IMAGE_TAG))
        return [*_bos(encoder), *images, *(Text(caption, supervised=True) for caption in captions)]


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
                question = _question(turn.text, image_position)
                segments += [*_bos(encoder), Text(opening), *question, Text(" [/INST]")]
                opening = "[INST] "
            else:
                # The space before the answer is its first token's, in any vocabulary: supervised like the answer.
                segments += [Text(f" {turn.text} ", supervised=True), SpecialToken(eos_id, supervised=True)]
        return segments


@dataclass(frozen=True)
class ChatTemplate(PromptTemplate):
    """The tokenizer's own chat template. Supervised are each answer and what follows it, up to the first special token.

    Args:
        system: The system message of conversations that have none; without it the template's own default stands.
        date: What the template gets when it asks for today's date ("26 Jul 2024" or "2024-07-26").
    """

    system: str | None = None
    date: str | datetime.date = FIXED_DATE

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
        messages = [("user" if turn.role == "human" else "assistant", turn.text) for turn in turns]
        if system is not None:
            messages.insert(0, ("system", system))
        chunks, trims = render_around([role for role, _ in messages], encoder.tokenizer, self.date)

        segments: Segments = []
        end_is_due = False  # an answer stands before this chunk, so its end is supervised
        for chunk, trim, (role, text) in zip(chunks, trims, messages, strict=False):
            answer = role == "assistant"
            text = trimmed(text, trim)
            if answer and chunk.endswith(" "):
                chunk, text = chunk[:-1], " " + text
            segments += _template_text(chunk, encoder, end_is_due)
            segments += _question(text, image_position) if role == "user" else [Text(text, supervised=answer)]
            end_is_due = answer
        return segments[:-1] if asking else segments + _template_text(chunks[-1], encoder, end_is_due)


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
        if name in TEMPLATES and not isinstance(value, str | datetime.date | None):
            raise ValueError(f"template.{key}: found {value!r}; it must be text, or null")
    return known[name](**settings)


def _bos(encoder: TextEncoder) -> Segments:
    id = encoder.tokenizer.bos_token_id
    return [] if id is None else [SpecialToken(id)]


def _question(text: str, image_position: ImagePosition) -> Segments:
    """A human turn with its images: in front of the text (one as in the reference, several line by line), or inline."""
    parts = text.split(IMAGE_TAG)
    if len(parts) == 1 or image_position == "inline":
        return [Text(parts[0]), *(segment for part in parts[1:] for segment in (ImageSlot(), Text(part)))]
    rest = "".join(parts).strip()
    return [*_image_row(len(parts) - 1), *([Text("\n" + rest)] if rest else [])]


def _image_row(num_images: int) -> Segments:
    """Images in order with a newline between them."""
    return [ImageSlot() if index % 2 == 0 else Text("\n") for index in range(2 * num_images - 1)]


def _template_text(chunk: str, encoder: TextEncoder, end_is_due: bool) -> Segments:
    """What a chat template wrote itself; supervised up to its first special token if an answer stands before it."""
    segments: Segments = []
    for part in encoder.split_special_tokens(chunk):
        if isinstance(part, int):
            segments.append(SpecialToken(part, supervised=end_is_due))
            end_is_due = False
        else:
            segments.append(Text(part, supervised=end_is_due))
    if end_is_due:
        raise ValueError(
            "the tokenizer's chat template puts no special token after an answer, so a model could not learn to stop; "
            "add one (such as eos_token) to the template, or use 'llava_llama_2'"
        )
    return segments
