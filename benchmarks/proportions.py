"""A model with a 7B's proportions that a CPU can train, and batches with the lengths of real stages.

Where a 7B step spends its work, this one does in the same shares: the head is 2 % of the language model, the vision
encoder about 10 % of a caption's step, an image is 128 of its tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch

from composer_path import PathMLLM
from composer_path.batches.dataset import Sample
from composer_path.records.tokenize import IGNORE_INDEX, IMAGE_TOKEN_ID
from composer_path.weights.assembly import assemble_model

IMAGE_TOKENS = 128
VOCABULARY = 512
LLAMA = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
}
# One head of width 64, as each of a ViT-L's.
VIT = {"name": "timm/vit_tiny_patch16_224", "tokens": "all"}
STAGES = {"captions": ("projector",), "instructions": ("projector", "language_model")}
STAGES["mixture"] = STAGES["instructions"]


def build_proportioned_model(
    trainable: tuple[str, ...], *, image_size: int = 448, llama: dict[str, int] | None = None
) -> PathMLLM:
    """The model with random weights, in fp32.

    Args:
        trainable: Modules that learn.
        image_size: In pixels; 448 gives the 785 tokens of the real encoder.
        llama: Keys that differ from `LLAMA`.
    """
    return assemble_model(
        vision_encoder=VIT | {"image_size": image_size, "kwargs": {"embed_dim": 64, "depth": 4, "num_heads": 1}},
        projector={"pooler": {"dim": 96, "num_queries": IMAGE_TOKENS, "num_heads": 8}},
        language_model={"config": LLAMA | (llama or {})},
        trainable=trainable,
    )


def draw_sample(
    generator: torch.Generator, sample_id: int, text: int, answer: int, num_images: int = 1, image_size: int = 448
) -> Sample:
    """One conversation of random tokens over random images.

    Args:
        generator: Of the random numbers.
        sample_id: Its position.
        text: Number of text tokens, the answer's among them.
        answer: How many of them are supervised; they stand at the end.
        num_images: Each takes `IMAGE_TOKENS` after the first token.
        image_size: In pixels.
    """
    words = torch.randint(3, VOCABULARY, (text,), generator=generator)
    image = torch.full((num_images * IMAGE_TOKENS,), IMAGE_TOKEN_ID)
    labels = torch.full((text + len(image),), IGNORE_INDEX)
    labels[-answer:] = words[-answer:]
    pixels = torch.randint(0, 256, (num_images, 3, image_size, image_size), generator=generator, dtype=torch.uint8)
    return Sample(
        sample_id=sample_id,
        input_ids=torch.cat([words[:1], image, words[1:]]),
        labels=labels,
        pixel_values=pixels,
        is_he=torch.zeros(num_images, dtype=torch.bool),
        source="random",
        problem=None,
    )


def draw_batch(suite: str, size: int, seed: int, image_size: int = 448, shorter: int = 1) -> list[Sample]:
    """A device batch of a suite: `captions`, `instructions` or `mixture`.

    Args:
        suite: Which lengths, see the functions below.
        size: Number of samples.
        seed: Of lengths, tokens and pixels.
        image_size: In pixels.
        shorter: Divides the text's lengths, for a quick run.
    """
    lengths = random.Random(f"{suite} {seed}")
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for sample_id in range(size):
        text, answer, num_images = LENGTHS[suite](lengths)
        text, answer = max(4, text // shorter), max(2, answer // shorter)
        batch.append(draw_sample(generator, sample_id, text, answer, num_images, image_size))
    return batch


def draw_caption(lengths: random.Random) -> tuple[int, int, int]:
    """150 to 210 tokens with the image, the caption all of the text but its first token."""
    text = lengths.randint(150 - IMAGE_TOKENS, 210 - IMAGE_TOKENS)
    return text, text - 1, 1


def draw_instruction(lengths: random.Random) -> tuple[int, int, int]:
    """200 to 1,500 text tokens, lognormal with the mean 574; about 40 % of them answers."""
    text = int(min(1500, max(200, math.exp(lengths.gauss(math.log(510), 0.5)))))
    return text, int(text * lengths.uniform(0.2, 0.6)), 1


def draw_of_mixture(lengths: random.Random) -> tuple[int, int, int]:
    """35 % multiple choice, 50 % instructions, 10 % text only, 5 % refusals."""
    kind = lengths.choices(("choice", "instruction", "text", "refusal"), (35, 50, 10, 5))[0]
    if kind == "choice":
        return lengths.randint(120, 220), lengths.randint(2, 12), 1
    if kind == "refusal":
        return lengths.randint(110, 180), lengths.randint(20, 60), 1
    text, answer, num_images = draw_instruction(lengths)
    return text, answer, 0 if kind == "text" else num_images


LENGTHS: dict[str, Callable[[random.Random], tuple[int, int, int]]] = {
    "captions": draw_caption,
    "instructions": draw_instruction,
    "mixture": draw_of_mixture,
}
