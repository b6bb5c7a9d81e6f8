"""Claims about batches on their way out of a worker: equal, in one piece of memory, and each in its own."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tiny_samples import assert_equal, assert_same, make_sample, mixed_samples
from torch.utils.data import DataLoader

from composer_path.batches.batch import Batch, PackedCollator, Sample


def featured_samples() -> list[Sample]:
    """The same with features in place of images; bf16, which numpy doesn't know."""
    samples = mixed_samples()
    for sample in samples:
        num_images = len(sample.pop("pixel_values"))
        sample["image_features"] = torch.arange(num_images * 15).view(num_images, 3, 5).bfloat16()
    return samples


class AndMore(PackedCollator):
    """A collator of somebody's own, which changes a batch in the worker."""

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        batch = super().__call__(samples)
        return replace(batch, targets=batch.targets.clone(), problems=["mine"] * len(samples))


@pytest.mark.parametrize("strategy", ["file_descriptor", "file_system"])
@pytest.mark.parametrize("samples", [mixed_samples(), mixed_samples()[1:2], featured_samples()])
def test_a_worker_sends_the_same_batch_in_one_piece(
    samples: list[Sample], strategy: str, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(lambda: torch.multiprocessing.set_sharing_strategy("file_descriptor"))
    torch.multiprocessing.set_sharing_strategy(strategy)
    (batch,) = DataLoader(samples, batch_size=8, num_workers=1, collate_fn=PackedCollator(16))
    assert_equal(batch, PackedCollator(16)(samples))
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor) and value.numel()]
    assert len(tensors) > 10
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert all(tensor.is_contiguous() and tensor.data_ptr() % 64 == 0 for tensor in tensors)


def test_what_a_collator_of_ones_own_changes_in_the_worker_arrives() -> None:
    (batch,) = DataLoader(mixed_samples(), batch_size=8, num_workers=1, collate_fn=AndMore())
    assert batch.problems == ["mine"] * 5
    expected = PackedCollator()(mixed_samples())
    assert_equal(replace(batch, problems=expected.problems), expected)


def test_a_batch_that_shares_nothing_is_pickled_as_it_is() -> None:
    expected = PackedCollator()(mixed_samples())
    assert_equal(pickle.loads(pickle.dumps(expected)), expected)


def test_batches_of_a_worker_do_not_share_memory_with_each_other() -> None:
    samples = [make_sample(index, 3, 2, images=1) for index in range(12)]
    batches = list(DataLoader(samples, batch_size=2, num_workers=1, collate_fn=PackedCollator()))
    for start, batch in zip(range(0, 12, 2), batches, strict=True):
        assert_same(batch.pixel_values, PackedCollator()(samples[start : start + 2]).pixel_values, "pixel_values")
    batches[0].pixel_values.zero_()
    assert batches[1].pixel_values[:, 0, 0, 0].tolist() == [20, 30]
