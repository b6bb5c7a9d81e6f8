"""Closed questions of a file of records as a data set of kaiko-eva."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from eva.language.data.messages import Message, TaskSystemMessage, UserMessage
from eva.multimodal.data.datasets.text_image import TextImageDataset
from torch import Tensor
from torchvision.transforms.v2.functional import to_image
from torchvision.tv_tensors import Image

from composer_path.asking.closed_questions import ClosedQuestion, parse_answer, read_closed_questions
from composer_path.images.fitting import rgb_image
from composer_path.images.folder import resolve_image
from composer_path.records.image_tags import IMAGE_TAG


class RecordQuestions(TextImageDataset[int]):
    """Questions of one kind, whose options are the same; the target is the right one's index.

    Args:
        data: Records, a JSON list or JSONL; `meta` has `options`, `answer` and `kind`.
        images: The folder of their images.
        kind: Which of them.
        options: In the order of the metrics' classes.
    """

    def __init__(self, data: str, images: str, kind: str, options: list[str]) -> None:
        super().__init__()
        self.data, self.images, self.kind, self.options = data, images, kind, options
        self.questions: list[ClosedQuestion] = []

    def configure(self) -> None:
        """Read the records.

        Raises:
            ValueError: There are none of the kind, or one can't be asked by kaiko-eva.
        """
        self.questions = [question for question in read_closed_questions(self.data) if question.kind == self.kind]
        if not self.questions:
            raise ValueError(f"'{self.data}': must hold questions of kind '{self.kind}'; found none; name another")
        for question in self.questions:
            self._check(question)

    def validate(self) -> None:
        """Nothing is left to check."""

    def __len__(self) -> int:
        return len(self.questions)

    def load_text(self, index: int) -> list[Message]:
        """The question; the wrapper puts all of its pictures before it."""
        question = self.questions[index]
        asked: list[Message] = [UserMessage(content=_text(question))]
        return asked if question.system is None else [TaskSystemMessage(content=question.system), *asked]

    def load_images(self, index: int) -> list[Image]:
        """Its pictures, upright and in colour."""
        files = [resolve_image(str(image), self.images) for image in self.questions[index].images]
        return [to_image(rgb_image(Path(file).read_bytes())) for file in files]

    def load_target(self, index: int) -> int:
        """The right option's index."""
        return self.options.index(self.questions[index].answer)

    def load_metadata(self, index: int) -> dict[str, Any]:
        """Where the question stands in its file."""
        return {"record": self.questions[index].where}

    def _check(self, question: ClosedQuestion) -> None:
        rule = fix = ""
        if sorted(question.options) != sorted(self.options):
            rule, fix = f"options must be {self.options}", "name another kind, or its options"
        elif len(question.turns) != 1:
            rule, fix = "a question must be the first of its conversation", "leave the record out"
        elif IMAGE_TAG in _text(question):
            rule, fix = f"{IMAGE_TAG} must stand on a line of its own", "move it"
        elif not all(isinstance(image, str) for image in question.images):
            rule, fix = "images must be files", "cut regions of slides out first"
        if rule:
            raise ValueError(f"{question.where}: for kaiko-eva {rule}; found another form; {fix}")


class OptionOfAnswer:
    """The index of the option that an answer names, as `composer-path evaluate` reads it; one more where it is none.

    Args:
        options: As the data set has them.
    """

    def __init__(self, options: list[str]) -> None:
        self.options = options

    def __call__(self, answers: list[str]) -> Tensor:
        """Of each answer."""
        chosen = [parse_answer(answer, self.options) for answer in answers]
        return torch.tensor([len(self.options) if one is None else self.options.index(one) for one in chosen])


def _text(question: ClosedQuestion) -> str:
    return "\n".join(line for line in question.turns[0][1].split("\n") if line != IMAGE_TAG)
