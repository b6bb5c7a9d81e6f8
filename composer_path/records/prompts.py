"""Prompt templates: what stands around a conversation's turns, and which pieces the model learns to write.

A template turns a conversation into a list of segments: text, special tokens and images, each marked as supervised (an
answer and its end) or not. Labels follow from these marks, so no arithmetic on token counts is needed.
"""

from __future__ import annotations

import datetime
import difflib
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from composer_path.records.conversation import IMAGE_TAG, Conversation, Turn
from composer_path.records.vocabulary import TextEncoder

# The system sentence that the reference's conversations start with (read from its token ids).
LLAVA_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
# For chat templates that ask for today's date: tokens must not change overnight. LLaMA-3's own template falls back on
# this day.
FIXED_DATE = "26 Jul 2024"


class TemplateError(ValueError):
    """A conversation that a template can't express, such as two questions in `plain`. Never holds its text."""


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


@dataclass(frozen=True)
class PromptTemplate(ABC):
    """How a conversation is written for the language model."""

    name: ClassVar[str]

    # The reference tokenizes the text after each image or special token as a text of its own (in LLaMA's vocabulary:
    # with a leading space). False leaves it to the tokenizer.
    prefix_after_special: ClassVar[bool] = True

    @abstractmethod
    def segments(
        self, conversation: Conversation, encoder: TextEncoder, image_position: str = "front"
    ) -> list[Segment]:
        """The conversation's segments; when its last turn is a question, they end where the answer starts.

        Raises:
            TemplateError: this template can't express the conversation.
            ValueError: the tokenizer lacks what this template needs.
        """


@dataclass(frozen=True)
class PlainTemplate(PromptTemplate):
    """Stage 1: the image, the caption, a newline. The question and a system message are dropped."""

    name: ClassVar[str] = "plain"

    def segments(
        self, conversation: Conversation, encoder: TextEncoder, image_position: str = "front"
    ) -> list[Segment]:
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
        system: the system message of conversations that have none; an empty one (or null) leaves the system block out.
    """

    system: str | None = LLAVA_SYSTEM

    name: ClassVar[str] = "llava_llama_2"

    def segments(
        self, conversation: Conversation, encoder: TextEncoder, image_position: str = "front"
    ) -> list[Segment]:
        """See PromptTemplate. Each answer is supervised with the spaces around it and the end-of-sequence token."""
        eos_id = encoder.tokenizer.eos_token_id
        if eos_id is None:
            raise ValueError(
                "template 'llava_llama_2' ends each answer with the end-of-sequence token, and this tokenizer has "
                "none; set eos_token in its tokenizer_config.json"
            )
        system = self.system if conversation.system is None else conversation.system
        opening = f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n" if system else "[INST] "
        segments: list[Segment] = []
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
    """The tokenizer's own chat template.

    It is rendered once with marks in place of all contents, and cut at the marks: what the template itself wrote may
    hold special tokens, what a conversation says never does. Supervised are each answer and what follows it, up to
    and including the first special token.

    Args:
        system: the system message of conversations that have none; without it the template's own default stands.
        date: what the template gets when it asks for today's date ("26 Jul 2024" or "2024-07-26").
    """

    system: str | None = None
    date: str | datetime.date = FIXED_DATE

    name: ClassVar[str] = "chat_template"
    prefix_after_special: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _read_date(self.date)

    def segments(
        self, conversation: Conversation, encoder: TextEncoder, image_position: str = "front"
    ) -> list[Segment]:
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
        chunks, trims = self._render([role for role, _ in messages], encoder)

        segments: list[Segment] = []
        end_is_due = False  # an answer stands before this chunk, so its end is supervised
        for chunk, trim, (role, text) in zip(chunks, trims, messages, strict=False):
            answer = role == "assistant"
            if answer and chunk.endswith(" "):
                chunk, text = chunk[:-1], " " + _trimmed(text, trim)
            else:
                text = _trimmed(text, trim)
            segments += _template_text(chunk, encoder, end_is_due)
            segments += _question(text, image_position) if role == "user" else [Text(text, supervised=answer)]
            end_is_due = answer
        if asking:
            return segments[:-1]
        return segments + _template_text(chunks[-1], encoder, end_is_due)

    def _render(self, roles: list[str], encoder: TextEncoder) -> tuple[list[str], list[_Trim]]:
        """The template's own text around each content, and how it trims that content."""
        tokenizer = encoder.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "template 'chat_template' needs a tokenizer that has one; this one has no chat_template (see its "
                "tokenizer_config.json), use 'llava_llama_2'"
            )
        import jinja2

        # An em space on both sides tells whether the template trims contents; no template writes one itself.
        marks = [f"mark{index}x{secrets.token_hex(8)}" for index in range(len(roles))]
        messages = [{"role": role, "content": f"\u2003{mark}\u2003"} for role, mark in zip(roles, marks, strict=True)]
        try:
            rendered = tokenizer.apply_chat_template(
                messages,
                chat_template=self._with_fixed_date(tokenizer.get_chat_template()),
                tokenize=False,
                date_string=_read_date(self.date).strftime("%d %b %Y"),  # what LLaMA-3's template looks for
            )
        except jinja2.TemplateError as error:  # for example a template without system messages
            raise TemplateError(
                f"the tokenizer's chat template refuses a conversation of the roles {', '.join(roles)}: {error}"
            ) from error
        # Alternately what the template wrote and a mark with what is left of its em spaces.
        pieces = re.split(f"(\u2003?(?:{'|'.join(marks)})\u2003?)", str(rendered))
        chunks, found = pieces[::2], pieces[1::2]
        if [piece.strip() for piece in found] != marks:
            raise TemplateError(
                f"the tokenizer's chat template must write each of the {len(marks)} messages once and in order, found "
                f"{len(found)} of them; use 'llava_llama_2' or change the tokenizer's chat template"
            )
        return chunks, [(not piece.startswith("\u2003"), not piece.endswith("\u2003")) for piece in found]

    def _with_fixed_date(self, chat_template: str) -> str:
        """Write the date into the template; transformers 5 lets no function of ours take `strftime_now`'s place."""
        date = _read_date(self.date)
        fixed = re.sub(
            r"strftime_now\s*\(\s*(['\"])(.*?)\1\s*\)", lambda match: repr(date.strftime(match[2])), chat_template
        )
        if re.search(r"strftime_now\s*\(", fixed):
            raise ValueError(
                "the tokenizer's chat template asks for today's date in a way that can't be replaced by template.date; "
                "write strftime_now's format as a plain string there"
            )
        return fixed


_Trim = tuple[bool, bool]  # the template removes white space at the content's start, at its end

TEMPLATES: dict[str, type[PromptTemplate]] = {
    template.name: template for template in (PlainTemplate, LlavaLlama2Template, ChatTemplate)
}


def get_template(template: str | Mapping[str, Any] | PromptTemplate) -> PromptTemplate:
    """A template by name, or by name and its settings, such as `{"name": "llava_llama_2", "system": "…"}`.

    Raises:
        ValueError: no template has this name, or it has no such setting.
    """
    if isinstance(template, PromptTemplate):
        return template
    settings = {"name": template} if isinstance(template, str) else dict(template)
    name = settings.pop("name", None)
    if name not in TEMPLATES:
        nearest = difflib.get_close_matches(str(name), TEMPLATES, n=1, cutoff=0.0)[0]
        raise ValueError(f"template: unknown name {name!r}; did you mean {nearest!r}? (known: {', '.join(TEMPLATES)})")
    allowed = [field.name for field in fields(TEMPLATES[name])]
    for key in settings:
        if key not in allowed:
            raise ValueError(f"template.{key}: {name!r} has no such setting (it has: {', '.join(allowed) or 'none'})")
    return TEMPLATES[name](**settings)


def _bos(encoder: TextEncoder) -> list[Segment]:
    id = encoder.tokenizer.bos_token_id
    return [] if id is None else [SpecialToken(id)]


def _question(text: str, image_position: str) -> list[Segment]:
    """A human turn with its images: in front of the text (one as in the reference, several line by line), or inline."""
    parts = text.split(IMAGE_TAG)
    if len(parts) == 1:
        return [Text(text)]
    if image_position == "inline":
        segments: list[Segment] = [Text(parts[0])]
        for part in parts[1:]:
            segments += [ImageSlot(), Text(part)]
        return segments
    rest = "".join(parts).strip()
    return [*_image_row(len(parts) - 1), *([Text("\n" + rest)] if rest else [])]


def _image_row(num_images: int) -> list[Segment]:
    """Images in order with a newline between them."""
    return [ImageSlot() if index % 2 == 0 else Text("\n") for index in range(2 * num_images - 1)]


def _template_text(chunk: str, encoder: TextEncoder, end_is_due: bool) -> list[Segment]:
    """What a chat template wrote itself; supervised up to its first special token if an answer stands before it."""
    segments: list[Segment] = []
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


def _trimmed(text: str, trim: _Trim) -> str:
    text = text.lstrip() if trim[0] else text
    return text.rstrip() if trim[1] else text


def _read_date(date: str | datetime.date) -> datetime.date:
    if isinstance(date, datetime.date):
        return date
    for form in ("%d %b %Y", "%Y-%m-%d"):
        try:
            return datetime.datetime.strptime(date, form).date()
        except ValueError:
            continue
    raise ValueError(f'template.date: found {date!r}; write it as "26 Jul 2024" or "2024-07-26"')
