"""Asking a trained model: a conversation over images, answered token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from composer_path.asking.processor_config import PROCESSOR_CONFIG, read_processor_config
from composer_path.images.examiner import Examiner
from composer_path.images.pixels import ImagePreparation
from composer_path.records.conversation import Conversation, Turn
from composer_path.records.image_tags import IMAGE_TAG
from composer_path.records.rules import ImageError
from composer_path.records.slide_region import SlideRegion
from composer_path.records.tokenize import TextPreparation
from composer_path.records.vocabulary import load_tokenizer
from composer_path.weights.model_folder import PathMLLM

Picture = UInt8[Tensor, "3 height width"]


class Assistant:
    """A model with its tokenizer, and its inputs prepared as in training.

    Args:
        model: On the device it shall run on.
        tokenizer: Of its language model.
        text: How text was prepared when it was trained.
        images: How images were.
    """

    def __init__(
        self, model: PathMLLM, tokenizer: PreTrainedTokenizerBase, text: TextPreparation, images: ImagePreparation
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.text, self.images = text, images

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: str | None = None, dtype: torch.dtype | None = None
    ) -> Assistant:
        """Load a folder written by an export or at the end of a finetuning run.

        Raises:
            ValueError: Not such a folder.
        """
        folder = Path(folder)
        if not (folder / PROCESSOR_CONFIG).is_file():  # told before weights are read
            raise ValueError(f"no {PROCESSOR_CONFIG} in '{folder}'; give the folder that composer-path export wrote")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = PathMLLM.from_pretrained(folder, dtype=dtype).to(device)
        return cls(model, load_tokenizer(folder), *read_processor_config(folder, model))

    @property
    def takes_question(self) -> bool:
        """Whether the model was trained to answer questions; if not, it captions."""
        return self.text.template.takes_question

    def read_image(self, path: str | Path, region: SlideRegion | None = None) -> Picture:
        """A picture, or a region of the slide at `path`, as the model sees it, not normalised.

        Raises:
            ValueError: No such file, or it can't be read as a picture.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"image '{path}': {'it is a folder' if path.is_dir() else 'there is no such file'}")
        try:
            examiner = Examiner()  # what a conversion would store, and its answer to what it wouldn't
            if region is None:
                return self.images.load(examiner.examine(path.read_bytes(), self.images.max_pixels).data)
            return self.images.load(examiner.region(path, region, self.images.max_pixels).data)
        except ImageError as error:
            raise ValueError(f"image '{path}': {error}") from None

    def answer(
        self,
        turns: Sequence[tuple[str, str]],
        images: Sequence[Picture] = (),
        *,
        system: str | None = None,
        **generation: Any,
    ) -> str:
        """The next answer of a conversation.

        Args:
            turns: ("human" or "assistant", text), the last one human. Where no text has an `<image>` tag, the images
                stand before the first question.
            images: In the order of the tags.
            system: Instead of the template's system message.
            **generation: Keywords of transformers' `generate`, such as `do_sample=True, temperature=0.7`, `streamer`
                (receives tokens as they come) or `max_new_tokens` (the answer is cut there; by default at 512).

        Raises:
            ValueError: The model's template takes no question, or the conversation is too long for the model.
        """
        if not self.takes_question:
            raise ValueError(
                f"the model was trained with the template '{self.text.template.name}', which takes no question: every "
                "one would get the same answer; ask without a question, and the model describes the image"
            )
        told = [Turn(role, text) for role, text in turns]
        if images and not any(IMAGE_TAG in turn.text for turn in told):
            told[0] = Turn(told[0].role, f"{IMAGE_TAG}\n" * len(images) + told[0].text)
        return self._continue(told, images, system, **generation)

    def caption(self, images: Sequence[Picture], **generation: Any) -> str:
        """What a model that takes no question says of images. Arguments as those of `answer`.

        Raises:
            ValueError: There is no image, or the model's template takes a question.
        """
        if self.takes_question:
            raise ValueError(f"the model's template '{self.text.template.name}' takes a question; give one")
        if not images:
            raise ValueError("a caption needs an image; give one with --image")
        return self._continue([Turn("human", IMAGE_TAG * len(images))], images, **generation)

    def _continue(
        self,
        turns: Sequence[Turn],
        images: Sequence[Picture],
        system: str | None = None,
        *,
        max_new_tokens: int = 512,
        **generation: Any,
    ) -> str:
        conversation = Conversation(turns=tuple(turns), images=("",) * len(images), system=system)
        prompt = self.text.prompt(conversation, self.tokenizer)
        limit = self.text.max_seq_len
        room = max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt))
        if room < 1:
            raise ValueError(f"the conversation takes {len(prompt)} tokens of {limit}; start a new one")
        new = self.model.generate(
            prompt,
            torch.stack(list(images)) if images else None,
            max_new_tokens=room,
            eos_token_id=self.end_ids(),
            pad_token_id=self.tokenizer.pad_token_id or 0,
            **generation,
        )
        return str(self.tokenizer.decode(new, skip_special_tokens=True)).strip()

    def end_ids(self) -> list[int]:
        """Tokens that end an answer: the one the template trains, and the tokenizer's own."""
        trained, own = self.text.end_id(self.tokenizer), self.tokenizer.eos_token_id
        return sorted({trained, own if own is not None else trained})
