"""Asking a trained model: a conversation over images, answered token by token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from composer_path.images.pixels import ImageError, load_image, pad_color_of
from composer_path.records.conversation import IMAGE_TAG, Conversation, Turn
from composer_path.records.slide_region import SlideRegion, region_png
from composer_path.records.tokenize import IGNORE_INDEX, tokenize_conversation, tokenize_prompt
from composer_path.records.vocabulary import load_tokenizer
from composer_path.run.export import PROCESSOR_CONFIG
from composer_path.weights.model_folder import PathMLLM


class Assistant:
    """A model with its tokenizer, and its inputs prepared as in training.

    Args:
        model: On the device it shall run on.
        tokenizer: Of its language model.
        processor: Keys `template`, `image_position`, `fit`, `decoder`, `max_seq_len`, as a run writes them.
    """

    def __init__(self, model: PathMLLM, tokenizer: PreTrainedTokenizerBase, processor: dict[str, Any]) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.processor = processor

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: str | None = None, dtype: torch.dtype | None = None
    ) -> Assistant:
        """Load a folder written by an export or at the end of a finetuning run.

        Raises:
            ValueError: Not such a folder.
        """
        folder = Path(folder)
        if not (folder / PROCESSOR_CONFIG).is_file():
            raise ValueError(f"no {PROCESSOR_CONFIG} in '{folder}'; give the folder that composer-path export wrote")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = PathMLLM.from_pretrained(folder, dtype=dtype).to(device)
        processor = json.loads((folder / PROCESSOR_CONFIG).read_text(encoding="utf-8"))
        return cls(model, load_tokenizer(folder), processor)

    def read_image(self, path: str | Path, region: SlideRegion | None = None) -> UInt8[Tensor, "3 height width"]:
        """A picture, or a region of the slide at `path`, as the model sees it, not normalised.

        Raises:
            ValueError: No such file, or it can't be read as a picture.
        """
        path, encoder = Path(path), self.model.vision_encoder
        if not path.is_file():
            raise ValueError(f"image '{path}': {'it is a folder' if path.is_dir() else 'there is no such file'}")
        try:
            return load_image(
                path.read_bytes() if region is None else region_png(path, region),
                encoder.image_size,
                fit=self.processor["fit"],
                decoder=self.processor["decoder"],
                pad_color=pad_color_of(encoder.mean),
            )
        except ImageError as error:
            raise ValueError(f"image '{path}': {error}") from None

    def answer(
        self,
        turns: Sequence[tuple[str, str]],
        images: Sequence[UInt8[Tensor, "3 height width"]] = (),
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        streamer: BaseStreamer | None = None,
        **generation: Any,
    ) -> str:
        """The next answer of a conversation.

        Args:
            turns: ("human" or "assistant", text), the last one human. Where no text has an `<image>` tag, the images
                stand before the first question.
            images: In the order of the tags.
            system: Instead of the template's system message.
            max_new_tokens: The answer is cut there.
            streamer: Receives tokens as they come.
            **generation: Keywords of transformers' `generate`, such as `do_sample=True, temperature=0.7`.
        """
        told = [Turn(role, text) for role, text in turns]
        if images and not any(IMAGE_TAG in turn.text for turn in told):
            told[0] = Turn(told[0].role, f"{IMAGE_TAG}\n" * len(images) + told[0].text)
        conversation = Conversation(turns=tuple(told), images=("",) * len(images), system=system)
        prompt = tokenize_prompt(
            conversation,
            self.tokenizer,
            self.processor["template"],
            self.model.num_image_tokens(),
            self.processor["image_position"],
        )
        room = self.processor["max_seq_len"] - len(prompt)
        if room < 1:
            raise ValueError(
                f"the conversation takes {len(prompt)} tokens of {self.processor['max_seq_len']}; start a new one"
            )
        pixel_values = torch.stack(list(images)) if images else None
        new = self.model.generate(
            prompt,
            pixel_values,
            max_new_tokens=min(max_new_tokens, room),
            eos_token_id=self.end_ids(),
            pad_token_id=self.tokenizer.pad_token_id or 0,
            streamer=streamer,
            **generation,
        )
        return self.tokenizer.decode(new, skip_special_tokens=True).strip()

    def end_ids(self) -> list[int]:
        """Tokens that end an answer: the one the template trains, and the tokenizer's own."""
        example = Conversation(turns=(Turn("human", "?"), Turn("assistant", "!")))
        labels = tokenize_conversation(example, self.tokenizer, self.processor["template"], 1).labels
        trained = int(labels[labels != IGNORE_INDEX][-1])
        return sorted({trained, self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else trained})
