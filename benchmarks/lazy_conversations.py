"""A data set as LLaVA-style repositories have it, written from their description: one JSON list, everything lazily.

Each time a sample is asked for, its image is opened, padded to a square, resized and normalised by transformers' image
processor, the prompt is put together as one string and tokenized by transformers' slow tokenizer, and the labels are
found by counting tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import CLIPImageProcessor, LlamaTokenizer

from composer_path.records.tokenize import IGNORE_INDEX, IMAGE_TOKEN_ID

IMAGE_TAG = "<image>"


class LazyConversations(Dataset[dict[str, Any]]):
    """Conversations of a JSON file, in LLaMA-2's chat format.

    Args:
        data: The JSON file.
        images: The folder of its images.
        tokenizer: LLaMA's slow one.
        num_image_tokens: Placeholders of an image.
        image_size: In pixels.
        mean: Of the vision encoder; padding has its colour.
        std: Of the vision encoder.
        system: The system sentence of records without one of their own.
        max_seq_len: Longer samples are cut at the end.
    """

    def __init__(
        self,
        data: Path,
        images: Path,
        tokenizer: LlamaTokenizer,
        *,
        num_image_tokens: int,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        system: str | None,
        max_seq_len: int,
    ) -> None:
        self.records = json.loads(data.read_text(encoding="utf-8"))
        self.images = images
        self.tokenizer = tokenizer
        self.num_image_tokens = num_image_tokens
        self.image_size = image_size
        self.pad_color = tuple(int(255 * channel) for channel in mean)
        self.processor = CLIPImageProcessor(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            image_mean=list(mean),
            image_std=list(std),
        )
        self.system = system
        self.max_seq_len = max_seq_len

    def __len__(self) -> int:
        """Number of records."""
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A sample: `input_ids`, `labels` and `images`."""
        record = self.records[index]
        turns = record["conversations"]
        if record.get("image") and not any(IMAGE_TAG in turn["value"] for turn in turns):
            turns = [turns[0] | {"value": f"{IMAGE_TAG}\n{turns[0]['value']}"}, *turns[1:]]
        rounds = self.rounds(turns, record.get("system", self.system))
        input_ids: list[int] = []
        labels: list[int] = []
        for question, answer in rounds:
            whole = self.encode(question + answer)
            num_asked = len(self.encode(question))
            input_ids += whole
            labels += [IGNORE_INDEX] * num_asked + whole[num_asked:]
        return {
            "input_ids": torch.tensor(input_ids[: self.max_seq_len]),
            "labels": torch.tensor(labels[: self.max_seq_len]),
            "images": self.load(record.get("image") or []),
        }

    def rounds(self, turns: Sequence[dict[str, str]], system: str | None) -> list[tuple[str, str]]:
        """The prompt's text, round by round: up to the answer, and the answer with its end."""
        opening = f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n" if system else "[INST] "
        rounds = []
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            asked = question["value"]
            if IMAGE_TAG in asked:
                tags = f"{IMAGE_TAG}\n" * asked.count(IMAGE_TAG)
                asked = tags + asked.replace(IMAGE_TAG, "").strip()
            rounds.append((f"{opening}{asked} [/INST]", f" {answer['value']} </s>"))
            opening = "[INST] "
        return rounds

    def encode(self, text: str) -> list[int]:
        """Ids with the tokenizer's start of sequence first; an image tag becomes its placeholders."""
        first, *others = text.split(IMAGE_TAG)
        ids = list(self.tokenizer(first)["input_ids"])
        for other in others:
            ids += [IMAGE_TOKEN_ID] * self.num_image_tokens + self.tokenizer(other)["input_ids"][1:]
        return ids

    def load(self, names: str | list[str]) -> Tensor:
        """The record's images as the encoder takes them: `[images, 3, size, size]`."""
        squares = [self.square(self.images / name) for name in ([names] if isinstance(names, str) else names)]
        if not squares:
            return torch.empty(0, 3, self.image_size, self.image_size)
        processed: Any = self.processor.preprocess(squares, return_tensors="pt")
        return torch.as_tensor(processed["pixel_values"])

    def square(self, path: Path) -> Image.Image:
        """An image, centred on a square of its longer side."""
        with Image.open(path) as file:
            image = file.convert("RGB")
        side = max(image.size)
        square = Image.new("RGB", (side, side), self.pad_color)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square
