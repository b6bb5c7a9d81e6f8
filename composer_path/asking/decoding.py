"""Answers that are written together: a row each, filled up at the left, with one cache of keys and values.

Rows come and go at any step. A row's tokens are those that it would have alone: what is filled up is masked, positions
are its own, and nothing but the model's rounding depends on who stands beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import DynamicCache

from composer_path.asking.answer import Answer
from composer_path.asking.image_features import ImageFeatures
from composer_path.asking.sampling import Drawn
from composer_path.models.language_types import check_length_supported
from composer_path.models.path_mllm import PathMLLM

# A layer's keys and values, of shape (rows, heads, tokens, width of a head).
_Cache = list[tuple[Tensor, Tensor]]


@dataclass
class _Rows:
    """Rows after a forward pass: cache, which of its tokens are real, and the scores of each row's next token."""

    cache: _Cache
    mask: Int64[Tensor, "rows tokens"]
    scores: Float[Tensor, "rows vocab"]

    def kept(self, rows: Sequence[int]) -> _Rows:
        """Some of the rows, without what was filled up for the others."""
        index = torch.tensor(rows, device=self.mask.device)
        mask = self.mask[index]
        first = int(mask.argmax(1).min())  # where the longest begins
        cache = [(keys[index, :, first:], values[index, :, first:]) for keys, values in self.cache]
        return _Rows(cache, mask[:, first:], self.scores[index])

    def joined(self, other: _Rows) -> _Rows:
        """These rows and others below them."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        pairs = zip(self._widened(length), other._widened(length), strict=True)
        cache = [(torch.cat([ours[0], theirs[0]]), torch.cat([ours[1], theirs[1]])) for ours, theirs in pairs]
        masks = [torch.nn.functional.pad(one.mask, (length - one.mask.shape[1], 0)) for one in (self, other)]
        return _Rows(cache, torch.cat(masks), torch.cat([self.scores, other.scores]))

    def _widened(self, length: int) -> _Cache:
        missing = (0, 0, length - self.mask.shape[1], 0)
        pad = torch.nn.functional.pad
        return [(pad(keys, missing), pad(values, missing)) for keys, values in self.cache]


class Decoding:
    """Writes answers, one token of each at a step.

    Args:
        model: On the device it shall run on.
        features: Of its images.
        never: Ids that no answer holds, such as an image's.

    Attributes:
        answers: Those that are being written, in the order of their rows.
    """

    def __init__(self, model: PathMLLM, features: ImageFeatures, never: Collection[int] = ()) -> None:
        self.model, self.features = model, features
        self.answers: list[Answer] = []
        self._rows: _Rows | None = None
        self._device = next(model.language_model.parameters()).device
        forward = inspect.signature(model.language_model.forward).parameters
        self._cache_key = "cache" if "cache" in forward else "past_key_values"  # until transformers 5.23 or so
        self._never = torch.tensor(sorted(never), device=self._device, dtype=torch.int64)

    @torch.inference_mode()
    def begin(self, answers: Sequence[Answer]) -> None:
        """Read the prompts of further answers, whose rows stand below those that are there."""
        embeds = self.features.embedded([answer.prompt for answer in answers])
        longest = max(len(one) for one in embeds)
        rows = torch.stack([torch.nn.functional.pad(one, (0, 0, longest - len(one), 0)) for one in embeds])
        lengths = torch.tensor([len(one) for one in embeds], device=self._device)
        mask = (torch.arange(longest, device=self._device) >= longest - lengths[:, None]).long()
        begun = self._forward([], mask, inputs_embeds=rows)
        self._rows = begun if self._rows is None else self._rows.joined(begun)
        self.answers += answers

    @torch.inference_mode()
    def step(self) -> None:
        """Write a token of each answer; those that end leave, and the model reads the others'."""
        assert self._rows is not None
        scores = self._rows.scores
        likeliest = scores.argmax(1).tolist()
        going = []
        for row, answer in enumerate(self.answers):
            sampler = answer.sampler
            answer.add(Drawn(likeliest[row]) if sampler.takes_likeliest else sampler.choose(scores[row]))
            if answer.finish is None:
                going.append(row)
        self._keep(going)
        if self._rows is None:
            return
        latest = torch.tensor([[answer.drawn[-1].id] for answer in self.answers], device=self._device)
        mask = torch.nn.functional.pad(self._rows.mask, (0, 1), value=1)
        self._rows = self._forward(self._rows.cache, mask, input_ids=latest)

    def drop(self, answer: Answer) -> None:
        """Write no more of an answer."""
        self._keep([row for row, one in enumerate(self.answers) if one is not answer])

    def clear(self) -> None:
        """Write no more of any."""
        self.answers, self._rows = [], None

    def _keep(self, rows: list[int]) -> None:
        if len(rows) == len(self.answers):
            return
        self.answers = [self.answers[row] for row in rows]
        self._rows = self._rows.kept(rows) if rows and self._rows is not None else None

    def _forward(self, cache: _Cache, mask: Tensor, **inputs: Tensor) -> _Rows:
        """The rows after the language model has read `inputs`, whose last tokens are those of the mask."""
        num_read = next(iter(inputs.values())).shape[1]
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -num_read:]
        kept: Any = DynamicCache()  # without a configuration every layer keeps all tokens, and windows are the mask's
        for layer, (keys, values) in enumerate(cache):
            kept.update(keys, values, layer)
        output = self.model.language_model(
            **{"attention_mask": mask, "position_ids": positions, self._cache_key: kept},
            use_cache=True,
            logits_to_keep=1,
            **inputs,
        )
        scores = output.logits[:, -1].float()
        scores[:, self._never] = -torch.inf
        return _Rows([(layer[0], layer[1]) for layer in kept], mask, scores)


def write_all(decoding: Decoding, answers: Sequence[Answer], batch_size: int) -> None:
    """Write answers to their end, `batch_size` at once, those of like length together."""
    waiting = sorted(answers, key=lambda answer: len(answer.prompt.input_ids), reverse=True)
    while waiting or decoding.answers:
        free = batch_size - len(decoding.answers)
        if waiting and (free >= max(1, batch_size // 4) or not decoding.answers):
            decoding.begin(waiting[:free])
            waiting = waiting[free:]
        decoding.step()


def rows_at_once(model: PathMLLM, wanted: int, longest: int | None) -> int:
    """How many rows may stand together: one, where a longer row would change a shorter one's positions."""
    try:
        check_length_supported(model.language_model.config, 2**31 if longest is None else longest)
    except ValueError:
        return 1
    return wanted
