"""Closed questions: answers out of a few options, compared with the majority answer and with a blank image.

A set of questions needs no code: a file of records whose `meta` has `options` and `answer` (and `kind`, by which
they are counted), given to `composer-path evaluate --data`. Another way of counting is a file beside this one.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from composer_path.asking.sampling import BATCH_SIZE, Sampling
from composer_path.conversion.record_file import read_records
from composer_path.images.folder import resolve_image
from composer_path.records.conversation import Conversation, Turn
from composer_path.records.rules import RecordError
from composer_path.records.slide_region import SlideRegion

if TYPE_CHECKING:
    from composer_path.asking.assistant import Assistant
else:
    Assistant = Any  # importing it takes seconds, and bad records are found without it

_BATCHES_HELD = 8


@dataclass(frozen=True)
class ClosedQuestion:
    """One question with its images, its options and the right one."""

    kind: str  # questions are counted by it
    turns: tuple[tuple[str, str], ...]  # (role, text) up to the question, which is the last
    options: tuple[str, ...]
    answer: str
    images: tuple[str | SlideRegion, ...]  # in the order of the tags
    system: str | None = None  # instead of the template's
    where: str = field(default="", compare=False)  # its record's place


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
            try:
                options, answer = _options_of(meta)
            except ValueError as error:
                raise ValueError(f"'{path}': {record.where}: {error}") from None
            turns = tuple((turn.role, turn.text) for turn in conversation.turns[:-1])
            shown = conversation.images, conversation.system
            kind = str(meta.get("kind", "closed"))
            questions.append(ClosedQuestion(kind, turns, options, answer, *shown, where=record.where))
    if not questions:
        raise ValueError(f"'{path}' has no closed question: no record has 'options' and 'answer' in its meta")
    return questions


def _options_of(meta: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """A question's options and the right one; ValueError where no answer could be right, or two options are one."""
    options, answer = meta["options"], meta["answer"]
    if not (isinstance(options, list) and len(options) > 1):
        found = "another value" if not isinstance(options, list) else f"{len(options)}"
        raise ValueError(f"meta.options must be a list of two options or more, found {found}; list them")
    if not all(isinstance(one, str | int | float) and _normalise(str(one)) for one in (*options, answer)):
        raise ValueError("meta.options and meta.answer must be texts or numbers, found another value; write them so")
    options, answer = tuple(map(str, options)), str(answer)
    if len({_normalise(option) for option in options}) < len(options):
        raise ValueError("meta.options must differ in more than case and blanks, found two alike; leave one out")
    if answer not in options:
        raise ValueError("meta.answer must be one of meta.options, found another; correct one of the two")
    return options, answer


def evaluate_closed(
    assistant: Assistant,
    questions: Sequence[ClosedQuestion],
    images_dir: str | Path,
    *,
    blank: bool = False,
    batch_size: int = BATCH_SIZE,
) -> ClosedResult:
    """Ask every question once, greedily; with white pictures (`blank`) it shows how far the text alone goes.

    `batch_size` questions are asked at once; of a few batches the pictures are held at a time.
    """
    result = ClosedResult()
    said: dict[Any, str] = {}  # the same words about as many white pictures are asked once
    for start in range(0, len(questions), _BATCHES_HELD * batch_size):
        group = questions[start : start + _BATCHES_HELD * batch_size]
        asked: dict[Any, tuple[Any, Sampling]] = {}
        keys = []
        for number, question in enumerate(group, start):
            longest = max(len(assistant.tokenizer(option)["input_ids"]) for option in question.options)
            same = (question.turns, question.system, len(question.images), longest)
            keys.append(same if blank else number)
            if keys[-1] not in asked and keys[-1] not in said:
                try:
                    asked[keys[-1]] = _prompt(assistant, question, images_dir, blank), Sampling(longest + 8)
                except ValueError as error:
                    raise ValueError(f"{question.where}: {error}" if question.where else str(error)) from None
        prompts, sampling = [list(column) for column in zip(*asked.values(), strict=True)] or ([], [])
        said |= zip(asked, assistant.answers(prompts, sampling, batch_size=batch_size), strict=True)
        for key, question in zip(keys, group, strict=True):
            chosen = parse_answer(said[key], question.options)
            result.asked[question.kind] += 1
            result.correct[question.kind] += chosen == question.answer
            result.unparsed[question.kind] += chosen is None
    return result


def _prompt(assistant: Assistant, question: ClosedQuestion, images_dir: str | Path, blank: bool) -> Any:
    images = [_read_image(assistant, image, images_dir) for image in question.images]
    if blank:
        images = [torch.full_like(image, 255) for image in images]
    turns = [Turn(role, text) for role, text in question.turns]
    return assistant.prompt(turns, images, system=question.system)


def _read_image(assistant: Assistant, image: str | SlideRegion, folder: str | Path) -> UInt8[Tensor, "3 height width"]:
    file, region = (image, None) if isinstance(image, str) else (image.file, image)
    return assistant.read_image(resolve_image(file, folder), region)


def compare_with_blank(
    assistant: Assistant, questions: Sequence[ClosedQuestion], images_dir: str | Path, batch_size: int = BATCH_SIZE
) -> dict[str, dict[str, Any]]:
    """Ask every question with its images and with blank ones; a plain mapping for JSON.

    It is `{"kinds": {kind: numbers}, "all": numbers}`; numbers are `asked`, `majority` (the share that always giving
    the most frequent answer gets right), and `with_image` and `blank_image`: {`correct`: …, `unparsed`: …}.
    """
    results = {
        "with_image": evaluate_closed(assistant, questions, images_dir, batch_size=batch_size),
        "blank_image": evaluate_closed(assistant, questions, images_dir, blank=True, batch_size=batch_size),
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
