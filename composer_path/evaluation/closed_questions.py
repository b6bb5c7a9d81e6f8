"""Closed questions: answers out of a few options, compared with the majority answer and with a blank image."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from composer_path.assistant import Assistant
from composer_path.data.conversation import Conversation, resolve_image


@dataclass(frozen=True)
class ClosedQuestion:
    """One question with its images, its options and the right one."""

    kind: str
    question: str
    options: tuple[str, ...]
    answer: str
    images: tuple[str, ...]
    system: str | None = None


@dataclass
class ClosedResult:
    """Counts of an evaluation, in all and by kind of question."""

    total: Counter[str] = field(default_factory=Counter)
    correct: Counter[str] = field(default_factory=Counter)
    unparsed: Counter[str] = field(default_factory=Counter)

    def accuracy(self, kind: str | None = None) -> float:
        """Share of right answers; an answer that names no option is wrong."""
        if kind is None:
            return self.correct.total() / max(1, self.total.total())
        return self.correct[kind] / max(1, self.total[kind])


def read_closed_questions(path: str | Path) -> list[ClosedQuestion]:
    """Closed questions of a JSON list of records: those whose `meta` has `options` and `answer`.

    Raises:
        ValueError: There is none.
    """
    questions = []
    for record in json.loads(Path(path).read_text(encoding="utf-8")):
        meta = record.get("meta") or {}
        if "options" not in meta or "answer" not in meta:
            continue
        conversation = Conversation.from_record(record)
        questions.append(
            ClosedQuestion(
                kind=str(meta.get("kind", "closed")),
                question=conversation.turns[-2].text,
                options=tuple(meta["options"]),
                answer=meta["answer"],
                images=conversation.images,
                system=conversation.system,
            )
        )
    if not questions:
        raise ValueError(f"'{path}' has no closed question: no record has 'options' and 'answer' in its meta")
    return questions


def evaluate_closed(
    assistant: Assistant, questions: Sequence[ClosedQuestion], images_dir: str | Path, *, blank: bool = False
) -> ClosedResult:
    """Ask every question once, greedily.

    Args:
        assistant: The model.
        questions: To ask.
        images_dir: Where their images lie.
        blank: Show white pictures instead, which tells how far the text alone goes.
    """
    result = ClosedResult()
    for question in questions:
        images = [assistant.read_image(resolve_image(name, images_dir)) for name in question.images]
        if blank:
            images = [torch.full_like(image, 255) for image in images]
        said = assistant.answer([("human", question.question)], images, system=question.system, max_new_tokens=16)
        chosen = parse_answer(said, question.options)
        result.total[question.kind] += 1
        result.correct[question.kind] += chosen == question.answer
        result.unparsed[question.kind] += chosen is None
    return result


def majority_accuracy(questions: Sequence[ClosedQuestion]) -> float:
    """What always giving each kind's most frequent answer would reach."""
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        answers[question.kind][question.answer] += 1
    return sum(max(counts.values()) for counts in answers.values()) / max(1, len(questions))


def parse_answer(said: str, options: Sequence[str]) -> str | None:
    """The option that an answer names: the whole answer, else the only option found in it as a word; else None."""
    plain = _normalise(said)
    for option in options:
        if plain == _normalise(option):
            return option
    found = [option for option in options if re.search(rf"(?<!\w){re.escape(_normalise(option))}(?!\w)", plain)]
    return found[0] if len(found) == 1 else None


def _normalise(text: str) -> str:
    return re.sub(r"\s+", " ", text.strip().rstrip(".").casefold())
