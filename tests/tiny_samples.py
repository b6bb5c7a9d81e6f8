"""Samples of a few tokens, each of whose ids is another's nowhere, and a comparison of what is made of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from composer_path import IGNORE_INDEX, IMAGE_TOKEN_ID
from composer_path.batches.batch import Batch, Sample


def make_sample(sample_id: int, question: int, answer: int, images: int = 0, problem: str | None = None) -> Sample:
    """Images of 3 placeholders each, question tokens, answer tokens; every id of every sample is different."""
    placeholders = torch.full((3 * images,), IMAGE_TOKEN_ID)
    text = 1000 * (sample_id + 1) + torch.arange(question + answer)
    input_ids = torch.cat([placeholders, text])
    labels = input_ids.clone()
    labels[: 3 * images + question] = IGNORE_INDEX
    marks = 10 * sample_id + torch.arange(images, dtype=torch.uint8)
    return Sample(
        sample_id=sample_id,
        input_ids=input_ids,
        labels=labels,
        pixel_values=marks[:, None, None, None].expand(-1, 3, 2, 2).contiguous(),
        is_he=torch.full((images,), sample_id % 2 == 0),
        source=f"source{sample_id}",
        problem=problem,
    )


def mixed_samples() -> list[Sample]:
    """One image, text-only, two images, one that can't be used, text-only without a question."""
    return [
        make_sample(0, 4, 3, images=1),
        make_sample(1, 2, 9),
        make_sample(2, 5, 1, images=2),
        make_sample(3, 1, 0, problem="unreadable-image"),
        make_sample(4, 0, 6),
    ]


def assert_same(left: Any, right: Any, key: str) -> None:
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, key
        assert torch.equal(left, right), key
    else:
        assert left == (pytest.approx(right) if isinstance(right, float) else right), key


def assert_equal(left: Batch, right: Batch) -> None:
    """Two batches in all of their fields."""
    assert type(left) is type(right) is Batch
    for key, value in vars(right).items():
        assert_same(getattr(left, key), value, key)
