"""Closed questions of a file of records as a data set of kaiko-eva."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eva.language.data.messages import Message, TaskSystemMessage, UserMessage
from eva.multimodal.data.datasets.text_image import TextImageDataset
from torchvision.transforms.v2.functional import to_image
from torchvision.tv_tensors import Image

from composer_path.asking.closed_questions import ClosedQuestion, read_closed_questions
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
        """The question, without the tags that the wrapper's pictures stand for."""
        question = self.questions[index]
        asked: list[Message] = [UserMessage(content=question.turns[0][1].removeprefix(_tags(question)))]
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
        elif IMAGE_TAG in question.turns[0][1].removeprefix(_tags(question)):
            rule, fix = "images must stand before the question", "leave the record out"
        elif not all(isinstance(image, str) for image in question.images):
            rule, fix = "images must be files", "cut regions of slides out first"
        if rule:
            raise ValueError(f"{question.where}: for kaiko-eva {rule}; found another form; {fix}")


def _tags(question: ClosedQuestion) -> str:
    return f"{IMAGE_TAG}\n" * len(question.images)
