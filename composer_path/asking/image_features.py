"""Images as the language model sees them, each computed once and kept for the next question about it."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from composer_path.asking.answer import Picture, Prompt
from composer_path.models.path_mllm import PathMLLM

Vectors = Float[Tensor, "image_tokens hidden"]
_AT_ONCE = 8  # images that the vision encoder takes together


class ImageFeatures:
    """Projected features of images, the latest kept by what the image holds.

    Args:
        model: Whose weights don't change meanwhile; after that, `forget`.
        kept: How many images' features stay.
    """

    def __init__(self, model: PathMLLM, kept: int = 64) -> None:
        self._model, self._kept = model, kept
        self._known: OrderedDict[bytes, Vectors] = OrderedDict()
        self.num_encoded = 0

    def forget(self) -> None:
        """Compute all anew."""
        self._known.clear()

    @torch.no_grad()
    def of(self, images: Sequence[Picture]) -> list[Vectors]:
        """The vectors of each image; equal ones are encoded once."""
        keys = [_key(image) for image in images]
        missing = {key: image for key, image in zip(keys, images, strict=True) if key not in self._known}
        found = {key: self._known[key] for key in keys if key in self._known}
        device = next(self._model.language_model.parameters()).device
        names = list(missing)
        for start in range(0, len(names), _AT_ONCE):
            some = names[start : start + _AT_ONCE]
            vectors = self._model.embed_images(torch.stack([missing[key] for key in some]).to(device))
            found |= {key: vector.clone() for key, vector in zip(some, vectors, strict=True)}
            self.num_encoded += len(some)
        for key in keys:
            self._known[key] = found[key]
            self._known.move_to_end(key)
        while len(self._known) > self._kept:
            self._known.popitem(last=False)
        return [found[key] for key in keys]

    @torch.no_grad()
    def embedded(self, prompts: Sequence[Prompt]) -> list[Float[Tensor, "tokens hidden"]]:
        """What the language model reads of each prompt: its words' embeddings, and images' vectors between them."""
        vectors = iter(self.of([image for prompt in prompts for image in prompt.images]))
        words: Any = self._model.language_model.get_input_embeddings()
        # No image: nothing of the vision encoder's is in a prompt that is only read.
        none = torch.zeros((0, 1, words.weight.shape[1]), device=words.weight.device, dtype=words.weight.dtype)
        rows = []
        for prompt in prompts:
            ids = prompt.input_ids.to(words.weight.device)
            images = [next(vectors) for _ in prompt.images]
            stacked = torch.stack(images) if images else none
            rows.append(self._model.embed_tokens(ids, stacked, (ids < 0).nonzero()[:, 0]))
        return rows


def _key(image: Picture) -> bytes:
    shape = repr(tuple(image.shape)).encode()
    return hashlib.blake2b(shape + image.contiguous().cpu().numpy().tobytes(), digest_size=16).digest()
