"""NEFTune: noise on the embeddings of text while finetuning (Jain et al., arXiv 2310.05914)."""

from __future__ import annotations

from typing import Any

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from jaxtyping import Float
from torch import Tensor, nn

from composer_path.algorithms.draws import draw_uniform, key_of, places_in_samples
from composer_path.batches.batch import Batch

_ENTRIES_AT_ONCE = 1 << 22  # 8 bytes each, several times


class Neftune(Algorithm):
    """Add noise to word embeddings: uniform in [-1, 1], times `alpha / sqrt(L * d)`, for L tokens of width d a sample.

    Runs before and after each forward pass of training; evaluation and generation are not touched. L counts all of the
    sample's tokens, images' placeholders too, whose vectors get no noise. The noise of a token depends on `seed`,
    epoch, sample, repetition and position alone, so neither ranks, workers, microbatches nor a resume change it. It
    costs a pass over the embeddings.

    Args:
        alpha: 5, 10 and 15 are the paper's.
        seed: Another seed gives other noise.
    """

    def __init__(self, alpha: float = 5.0, seed: int = 17) -> None:
        if not 0 < alpha <= 1000:
            raise ValueError(f"neftune: alpha must be above 0 and at most 1000, found {alpha}")
        self.alpha, self.seed = alpha, seed
        self.hook: Any = None

    def __repr__(self) -> str:
        return f"Neftune(alpha={self.alpha}, seed={self.seed})"

    def match(self, event: Event, state: State) -> bool:
        """Run around forward passes of training; a step's or an evaluation's start ends what an error left over."""
        return event in (Event.BEFORE_FORWARD, Event.AFTER_FORWARD, Event.EVAL_START, Event.FIT_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Hook the embedding, or let it go."""
        if self.hook is not None:
            self.hook.remove()
            self.hook = None
        if event == Event.BEFORE_FORWARD:
            whole: Any = state.model
            embed: nn.Module = getattr(whole, "module", whole).model.language_model.get_input_embeddings()
            batch, key = state.batch, key_of(self.seed, state.timestamp.epoch.value, "neftune")

            def add_noise(module: nn.Module, inputs: Any, embeds: Tensor) -> Tensor:
                return embeds + text_noise(batch, embeds.shape[-1], self.alpha, key).to(embeds.dtype)

            self.hook = embed.register_forward_hook(add_noise)


@torch.no_grad()
def text_noise(batch: Batch, dim: int, alpha: float, key: int) -> Float[Tensor, "tokens dim"]:
    """The noise of a row, 0 where an image stands."""
    tokens = len(batch.input_ids)
    lengths = torch.diff(batch.cu_seq_lens).long()

    def per_token(values: Tensor) -> Tensor:
        return values.repeat_interleave(lengths, output_size=tokens)

    scale = alpha / (per_token(lengths).float() * dim).sqrt() * (batch.input_ids >= 0)
    places = places_in_samples(lengths, tokens) + (per_token(batch.repetitions) << 32)
    ids, rows = per_token(batch.sample_ids), max(1, _ENTRIES_AT_ONCE // dim)
    parts = [
        (draw_uniform(key, ids[at : at + rows], places[at : at + rows], dim) * 2 - 1) * scale[at : at + rows, None]
        for at in range(0, tokens, rows)
    ]
    return torch.cat(parts)
