"""What each answer token of a row counts in the loss: by its turn's weight, and by what is averaged over.

How these are summed over microbatches and ranks: `loss` of models/composer_model.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

LossAverage = Literal["token", "sample", "square", "rank"]


def target_weights(
    num_targets: Int64[Tensor, " samples"],
    loss_average: LossAverage,
    label_weights: Float32[Tensor, " targets"] | None = None,
) -> Float32[Tensor, " targets"]:
    """What each target counts in the loss, see `PackedCollator`; a label of weight 0.5 is half a target throughout."""
    counts = num_targets.double()
    if label_weights is not None:
        sample = torch.arange(len(num_targets)).repeat_interleave(num_targets)
        counts = torch.zeros_like(counts).index_add(0, sample, label_weights.double())
    counts = counts.where(counts > 0, 1.0)  # of a sample without a target
    if loss_average == "rank":
        total = num_targets.sum() if label_weights is None else label_weights.double().sum()
        per_sample = torch.full_like(counts, 1.0 / (float(total) or 1.0))
    else:
        per_sample = {"token": torch.ones_like(counts), "sample": 1 / counts, "square": counts.rsqrt()}[loss_average]
    weights = per_sample.repeat_interleave(num_targets).float()
    return weights if label_weights is None else weights * label_weights


def label_weights(
    samples: Sequence[Mapping[str, Any]], index: Int64[Tensor, " targets"]
) -> Float32[Tensor, " targets"] | None:
    """What the labels at these positions of the row count by their turns; None where each counts 1."""
    if not any("label_weights" in sample for sample in samples):
        return None
    ones = (torch.ones(len(sample["labels"])) for sample in samples)
    whole = [sample.get("label_weights", one).roll(-1) for sample, one in zip(samples, ones, strict=True)]
    return torch.cat(whole)[index]
