"""How the next token of an answer is chosen: the likeliest, or one drawn by its probability with a seed of its own."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

BATCH_SIZE = 16  # answers that are written at once
LEAST_LOGPROB = -9999.0  # of what is never written: JSON has no infinity


@dataclass(frozen=True)
class Sampling:
    """How one answer is written.

    Args:
        max_new_tokens: It is cut there.
        temperature: 0 always takes the likeliest token.
        top_p: Tokens are drawn from the likeliest that have this probability together.
        seed: Of the draws; another each time where it is None.
        stop: Texts that end the answer, which then doesn't hold them.
        top_logprobs: How many tokens are told at each step with their logarithmic probability, beside the one taken;
            None for no probabilities at all.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, right, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("stop", all(self.stop), "texts that aren't empty"),
            ("top_logprobs", self.top_logprobs is None or self.top_logprobs >= 0, "0 or more"),
        ):
            if not right:
                raise ValueError(f"{name}: must be {rule}, found {getattr(self, name)!r}; correct it")


@dataclass(frozen=True)
class Drawn:
    """A token that was chosen; where it was asked for with its logarithmic probability and those of the likeliest."""

    id: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one answer. Its draws are its own, whatever is written beside it."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._draws = torch.Generator()
        self._draws.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed)

    @property
    def takes_likeliest(self) -> bool:
        """Whether nothing but the likeliest token is asked for."""
        return self.sampling.temperature == 0 and self.sampling.top_logprobs is None

    def choose(self, scores: Float[Tensor, " vocab"]) -> Drawn:
        """Choose by the model's scores (logits); probabilities that are told are the model's, before temperature."""
        scores = scores.double().cpu()
        id = self._draw(scores) if self.sampling.temperature > 0 else int(scores.argmax())
        if self.sampling.top_logprobs is None:
            return Drawn(id)
        logprobs = scores.log_softmax(0).clamp(min=LEAST_LOGPROB)
        best = logprobs.topk(min(self.sampling.top_logprobs, len(logprobs)))
        top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return Drawn(id, float(logprobs[id]), tuple(top))

    def _draw(self, scores: Tensor) -> int:
        sharpened = (scores - scores.max()) / self.sampling.temperature
        probabilities = sharpened.softmax(0)
        if self.sampling.top_p < 1:
            sorted_, order = probabilities.sort(descending=True, stable=True)
            before = sorted_.cumsum(0) - sorted_
            probabilities[order[before >= self.sampling.top_p]] = 0
        return int(torch.multinomial(probabilities, 1, generator=self._draws))
