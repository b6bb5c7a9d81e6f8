"""One picture and one question, put to two models: how far their logits are apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from composer_path.asking.assistant import Assistant
from composer_path.models.path_mllm import PathMLLM
from composer_path.records.conversation import Conversation, Turn
from composer_path.records.image_tags import IMAGE_TAG
from composer_path.weights.assembly import assemble_model
from composer_path.weights.model_folder import is_model_folder
from composer_path.weights.whole_folder import sections_of

QUESTION = "What does this image show?"


@dataclass(frozen=True)
class LogitsDifference:
    """Of the logits after each token of a prompt.

    Attributes:
        max_abs: The largest difference.
        max_rel: Relative to the largest logit of A.
        positions: How many tokens the prompt has.
        other_choices: At how many of them another token is the most likely.
    """

    max_abs: float
    max_rel: float
    positions: int
    other_choices: int


def compare_logits(a: str | Path, b: str | Path, image: str | Path, question: str = QUESTION) -> LogitsDifference:
    """Ask both, prepared as one of them was trained: A, or B where A's folder doesn't say how.

    Raises:
        ValueError: Neither folder says how it is asked, or they don't take the same images or words.
    """
    told = next((place for place in (a, b) if is_model_folder(Path(place))), None)
    if told is None:
        raise ValueError("--logits: one of the folders must be one that export wrote, found none; it says how to ask")
    assistant = Assistant.from_pretrained(told, device="cpu", dtype=torch.float32)
    picture = assistant.read_image(image)
    words = f"{IMAGE_TAG}\n{question}" if assistant.takes_question else IMAGE_TAG
    conversation = Conversation(turns=(Turn("human", words),), images=("",))
    ids = assistant.text.prompt(conversation, assistant.tokenizer)
    models = [assistant.model if place == told else _model(place) for place in (a, b)]
    counts = [model.num_image_tokens() for model in models]
    if counts[0] != counts[1]:
        raise ValueError(f"--logits: both must take as many tokens for an image, found {counts[0]} and {counts[1]}")
    first, second = (_logits(model, ids, picture[None]) for model in models)
    known = min(first.shape[-1], second.shape[-1])
    first, second = first[:, :known], second[:, :known]
    gap, largest = float((first - second).abs().max()), float(first.abs().max())
    others = int((first.argmax(-1) != second.argmax(-1)).sum())
    return LogitsDifference(gap, gap / largest if largest else gap, len(ids), others)


def _model(place: str | Path) -> PathMLLM:
    sections: dict[str, Any] = sections_of(place)
    return assemble_model(**sections, trainable=["projector"], attention="sdpa").eval()


def _logits(model: PathMLLM, ids: Tensor, pixels: Tensor) -> Tensor:
    length = len(ids)
    borders = torch.tensor([0, length], dtype=torch.int32)
    with torch.no_grad():
        return model(ids, torch.arange(length), borders, length, pixels, (ids < 0).nonzero()[:, 0])
