"""Closed questions: answers out of a few options, compared with the majority answer and with a blank image.

A set of questions needs no code: a file of records whose `meta` has `options` and `answer` (and `kind`, by which
they are counted), given to `composer-path evaluate --data`. Another way of counting is a file beside this one.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from composer_path.conversion.record_file import read_records
from composer_path.images.folder import resolve_image
from composer_path.records.conversation import Conversation
from composer_path.records.rules import RecordError
from composer_path.records.slide_region import SlideRegion

if TYPE_CHECKING:
    from composer_path.asking.assistant import Assistant
else:
    Assistant = Any  # importing it takes seconds, and bad records are found without it


@dataclass(frozen=True)
class ClosedQuestion:
    """One question with its images, its options and the right one."""

    kind: str  # questions are counted by it
    turns: tuple[tuple[str, str], ...]  # (role, text) up to the question, which is the last
    options: tuple[str, ...]
    answer: str
    images: tuple[str | SlideRegion, ...]  # in the order of the tags
    system: str | None = None  # instead of the template's


@dataclass
class ClosedResult:
    """Counts of answers, by kind of question. An answer that names no option, or several, is unparsed and wrong."""

    asked: Counter[str] = field(default_factory=Counter)
    correct: Counter[str] = field(default_factory=Counter)
    unparsed: Counter[str] = field(default_factory=Counter)

    def count(self, what: str, kind: str | None = None) -> int:
        """Number of `asked`, `correct` or `unparsed` questions, of one kind or of all."""
        counts: Counter[str] = getattr(self, what)
        return counts.total() if kind is None else counts[kind]


def read_closed_questions(path: str | Path) -> list[ClosedQuestion]:
    """Closed questions of a file of records (JSON list or JSONL): those whose `meta` has `options` and `answer`.

    Raises:
        ValueError: There is none, or a record breaks a rule.
    """
    questions = []
    for record in read_records(path):
        try:
            if isinstance(record.value, RecordError):
                raise record.value
            conversation = Conversation.from_record(record.value)
        except RecordError as error:
            raise ValueError(f"'{path}': {error.at(record.where)}") from None
        meta = conversation.metadata.get("meta") or {}
        if "options" in meta and "answer" in meta:
            if not (isinstance(meta["options"], list) and len(meta["options"]) > 1):
                found = "another value" if not isinstance(meta["options"], list) else f"{len(meta['options'])}"
                rule = "meta.options must be a list of two options or more"
                raise ValueError(f"'{path}': {record.where}: {rule}, found {found}; list them")
            turns = tuple((turn.role, turn.text) for turn in conversation.turns[:-1])
            kind, options = str(meta.get("kind", "closed")), tuple(map(str, meta["options"]))
            shown = conversation.images, conversation.system
            questions.append(ClosedQuestion(kind, turns, options, str(meta["answer"]), *shown))
    if not questions:
        raise ValueError(f"'{path}' has no closed question: no record has 'options' and 'answer' in its meta")
    return questions


def evaluate_closed(
    assistant: Assistant, questions: Sequence[ClosedQuestion], images_dir: str | Path, *, blank: bool = False
) -> ClosedResult:
    """Ask every question once, greedily; with white pictures (`blank`) it shows how far the text alone goes."""
    result = ClosedResult()
    said_of_blank: dict[Any, str] = {}  # the same words about as many white pictures are asked once
    for question in questions:
        images = [_read_image(assistant, image, images_dir) for image in question.images]
        longest = max(len(assistant.tokenizer(option)["input_ids"]) for option in question.options)
        settings: dict[str, Any] = {"system": question.system, "max_new_tokens": longest + 8}
        if blank:
            asked = (question.turns, question.system, len(images), longest)
            if asked not in said_of_blank:
                white = [torch.full_like(image, 255) for image in images]
                said_of_blank[asked] = assistant.answer(question.turns, white, **settings)
            said = said_of_blank[asked]
        else:
            said = assistant.answer(question.turns, images, **settings)
        chosen = parse_answer(said, question.options)
        result.asked[question.kind] += 1
        result.correct[question.kind] += chosen == question.answer
        result.unparsed[question.kind] += chosen is None
    return result


def _read_image(assistant: Assistant, image: str | SlideRegion, folder: str | Path) -> UInt8[Tensor, "3 height width"]:
    file, region = (image, None) if isinstance(image, str) else (image.file, image)
    return assistant.read_image(resolve_image(file, folder), region)


def compare_with_blank(
    assistant: Assistant, questions: Sequence[ClosedQuestion], images_dir: str | Path
) -> dict[str, dict[str, Any]]:
    """Ask every question with its images and with blank ones; a plain mapping for JSON.

    It is `{"kinds": {kind: numbers}, "all": numbers}`; numbers are `asked`, `majority` (the share that always giving
    the most frequent answer gets right), and `with_image` and `blank_image`: {`correct`: …, `unparsed`: …}.
    """
    results = {
        "with_image": evaluate_closed(assistant, questions, images_dir),
        "blank_image": evaluate_closed(assistant, questions, images_dir, blank=True),
    }

    def numbers(kind: str | None) -> dict[str, Any]:
        of_kind = [question for question in questions if kind in (None, question.kind)]
        told = ("correct", "unparsed")
        counts = {name: {what: result.count(what, kind) for what in told} for name, result in results.items()}
        return {"asked": len(of_kind), "majority": majority_accuracy(of_kind), **counts}

    return {"kinds": {kind: numbers(kind) for kind in sorted({q.kind for q in questions})}, "all": numbers(None)}


def majority_accuracy(questions: Sequence[ClosedQuestion]) -> float:
    """What always giving each kind's most frequent answer would reach."""
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        answers[question.kind][question.answer] += 1
    return sum(max(counts.values()) for counts in answers.values()) / max(1, len(questions))


def parse_answer(said: str, options: Sequence[str]) -> str | None:
    """The option that an answer names: the whole answer, else the only option found in it as a word; else None.

    An option of one letter must begin the answer and be marked as one (`B.`, `(B)`, `B: ...`): "a" is a word, too.
    """
    plain = _normalise(said)
    for option in options:
        if plain == _normalise(option):
            return option
    found = [option for option in options if re.search(_pattern(_normalise(option)), plain)]
    return found[0] if len(found) == 1 else None


def _pattern(option: str) -> str:
    return rf"^\(?{re.escape(option)}[.):,]" if len(option) == 1 else rf"(?<!\w){re.escape(option)}(?!\w)"


def _normalise(text: str) -> str:
    return re.sub(r"\s+", " ", text.strip().rstrip(".").casefold())
