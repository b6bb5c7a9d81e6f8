"""Claims about padding-free rows: layout, labels, loss weights, bins, and microbatches as views."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from composer_path import IGNORE_INDEX, IMAGE_TOKEN_ID
from composer_path.batches.collator import LOSS_AVERAGES, PackedCollator
from composer_path.batches.dataset import Sample
from composer_path.batches.microbatches import fewest_bins, slice_batch
from composer_path.batches.sending import SentBatch

# Whatever isn't shifted to the slice's own start.
VIEWS = (
    *("input_ids", "position_ids", "labels", "targets", "target_weights", "pixel_values", "is_he", "image_sample_ids"),
    *("sample_ids", "num_images", "num_targets", "num_placeholders"),
)


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


def random_samples(seed: int, count: int = 12) -> list[Sample]:
    draw = random.Random(seed)
    return [
        make_sample(index, draw.randint(1, 12), draw.randint(0, 12), images=draw.choice([0, 0, 1, 2]))
        for index in range(count)
    ]


def in_row_order(samples: Sequence[Sample], batch: dict[str, Any]) -> list[Sample]:
    by_id = {sample["sample_id"]: sample for sample in samples}
    return [by_id[sample_id] for sample_id in batch["sample_ids"].tolist()]


def pieces(batch: dict[str, Any], key: str) -> list[torch.Tensor]:
    """A row's values, sample by sample."""
    return list(batch[key].split(torch.diff(batch["cu_seq_lens"]).tolist()))


def assert_same(left: Any, right: Any, key: str) -> None:
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, key
        assert torch.equal(left, right), key
    else:
        assert left == (pytest.approx(right) if isinstance(right, float) else right), key


@pytest.mark.parametrize("limit", [None, 16])
def test_samples_lie_one_behind_the_other_and_positions_restart(limit: int | None) -> None:
    samples = mixed_samples()
    batch = PackedCollator(limit)(samples)
    assert sorted(batch["sample_ids"].tolist()) == [0, 1, 2, 3, 4]
    ordered = in_row_order(samples, batch)
    lengths = [len(sample["input_ids"]) for sample in ordered]
    assert batch["cu_seq_lens"].dtype == torch.int32
    assert batch["cu_seq_lens"].tolist() == [sum(lengths[:at]) for at in range(6)]
    assert batch["max_seq_len"] == max(lengths) == 12
    rows = zip(ordered, pieces(batch, "input_ids"), pieces(batch, "position_ids"), strict=True)
    for sample, input_ids, position_ids in rows:
        assert torch.equal(input_ids, sample["input_ids"])
        assert position_ids.tolist() == list(range(len(input_ids)))
    assert [sample["source"] for sample in ordered] == batch["sources"]
    assert [sample["problem"] for sample in ordered] == batch["problems"]
    if limit is None:
        assert batch["sample_ids"].tolist() == [0, 1, 2, 3, 4]
        assert batch["samples_per_bin"] == [5]
    else:
        assert len(batch["samples_per_bin"]) > 1
        assert sum(batch["samples_per_bin"]) == 5


def test_labels_are_shifted_inside_each_sample_and_never_across() -> None:
    samples = mixed_samples()
    assert samples[4]["labels"][0] != IGNORE_INDEX  # what a shift of the whole row would hand to sample 3's last token
    batch = PackedCollator()(samples)
    for sample, labels in zip(samples, pieces(batch, "labels"), strict=True):
        assert labels.tolist() == [*sample["labels"][1:].tolist(), IGNORE_INDEX]


def test_each_target_is_the_token_after_its_position() -> None:
    batch = PackedCollator(16)(mixed_samples())
    index, targets = batch["supervised_index"], batch["targets"]
    assert torch.equal(targets, batch["labels"][index])
    assert torch.equal(targets, batch["input_ids"][index + 1])
    assert torch.equal(index, (batch["labels"] != IGNORE_INDEX).nonzero()[:, 0])
    assert batch["num_targets"].sum() == len(targets) == len(batch["target_weights"])
    # The first token of a sample is nobody's target, so sample 4 (an answer alone) has one fewer than it has labels.
    counts = dict(zip(batch["sample_ids"].tolist(), batch["num_targets"].tolist(), strict=True))
    assert counts == {0: 3, 1: 9, 2: 1, 3: 0, 4: 5}


def test_images_stay_with_their_sample_in_order() -> None:
    batch = PackedCollator(16)(mixed_samples())
    assert torch.equal(batch["image_index"], (batch["input_ids"] == IMAGE_TOKEN_ID).nonzero()[:, 0])
    counts = zip(
        batch["sample_ids"].tolist(), batch["num_images"].tolist(), batch["num_placeholders"].tolist(), strict=True
    )
    assert sorted(counts) == [(0, 1, 3), (1, 0, 0), (2, 2, 6), (3, 0, 0), (4, 0, 0)]
    order = [sample_id for sample_id in batch["sample_ids"].tolist() if sample_id in (0, 2)]
    marks = {0: [0], 2: [20, 21]}
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [mark for sample_id in order for mark in marks[sample_id]]
    assert batch["image_sample_ids"].tolist() == [sample_id for sample_id in order for _ in marks[sample_id]]


def test_stain_is_known_for_each_image() -> None:
    batch = PackedCollator()([make_sample(0, 1, 1, images=2), make_sample(1, 1, 1, images=1), make_sample(2, 1, 1)])
    assert batch["is_he"].tolist() == [True, True, False]


def test_a_batch_of_text_only_has_no_images() -> None:
    batch = PackedCollator()([make_sample(0, 2, 2), make_sample(1, 3, 1)])
    assert batch["pixel_values"].shape == (0, 3, 2, 2)
    assert [len(batch[key]) for key in ("is_he", "image_index", "image_sample_ids")] == [0, 0, 0]
    assert batch["num_images"].tolist() == [0, 0]


def test_a_sample_that_cannot_be_used_keeps_its_slot_with_weight_0() -> None:
    usable = mixed_samples()
    del usable[3]
    for loss_average in LOSS_AVERAGES:
        batch = PackedCollator(loss_average=loss_average)(mixed_samples())
        without = PackedCollator(loss_average=loss_average)(usable)
        assert len(batch["num_images"]) == 5
        assert batch["problems"] == [None, None, None, "unreadable-image", None]
        assert_same(batch["targets"], without["targets"], "targets")
        assert_same(batch["target_weights"], without["target_weights"], "target_weights")
        assert batch["loss_weight"] == without["loss_weight"]


def test_a_batch_without_an_answer_weighs_nothing() -> None:
    for loss_average in LOSS_AVERAGES:
        batch = PackedCollator(loss_average=loss_average)([make_sample(0, 3, 0), make_sample(1, 2, 0)])
        assert batch["loss_weight"] == 0
        assert batch["targets"].shape == batch["target_weights"].shape == (0,)


@pytest.mark.parametrize(
    ("loss_average", "weight_of", "total"),
    [
        ("token", lambda answer: 1.0, 30.0),
        ("sample", lambda answer: 1 / answer, 3.0),
        ("square", lambda answer: answer**-0.5, 1 + 2 + 5.0),
        ("rank", lambda answer: 1 / 30, 1.0),
    ],
)
def test_targets_weigh_what_the_loss_average_says(loss_average: str, weight_of: Any, total: float) -> None:
    answers = {0: 4, 1: 1, 2: 25, 3: 0}
    batch = PackedCollator(24, loss_average)([make_sample(index, 3, answer) for index, answer in answers.items()])
    weights = batch["target_weights"].split(batch["num_targets"].tolist())
    assert batch["target_weights"].dtype == torch.float32
    for sample_id, of_sample in zip(batch["sample_ids"].tolist(), weights, strict=True):
        assert len(of_sample) == answers[sample_id]
        assert of_sample.tolist() == pytest.approx([weight_of(answers[sample_id]) for _ in of_sample])
    assert batch["loss_weight"] == pytest.approx(total)


def test_an_unknown_loss_average_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown 'tokens'; choose one of token, sample, square, rank"):
        PackedCollator(loss_average="tokens")


def first_fit_decreasing(lengths: Sequence[int], limit: int) -> int:
    """Number of bins, computed here on its own."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        for at, room in enumerate(rooms):
            if length <= room:
                rooms[at] -= length
                break
        else:
            rooms.append(limit - length)
    return len(rooms)


@pytest.mark.parametrize("longest", [100, 400, 1000, 1300])  # the last: some samples are longer than the limit
def test_bins_keep_the_limit_and_are_as_few_as_first_fit_decreasing_finds(longest: int) -> None:
    draw = random.Random(longest)
    for _ in range(100):
        lengths = [draw.randint(1, longest) for _ in range(draw.randint(1, 40))]
        bins = fewest_bins(lengths, 1000)
        assert sorted(index for indices in bins for index in indices) == list(range(len(lengths)))
        assert all(sum(lengths[index] for index in indices) <= 1000 or len(indices) == 1 for indices in bins)
        if max(lengths) <= 1000:
            assert len(bins) >= math.ceil(sum(lengths) / 1000)
        assert len(bins) <= first_fit_decreasing(lengths, 1000)
        assert bins == sorted(sorted(indices) for indices in bins)


def test_bins_are_evened_out() -> None:
    bins = fewest_bins([100] * 16, 900)  # tightly packed it would be 9 and 7
    assert [len(indices) for indices in bins] == [8, 8]
    draw = random.Random(0)
    for _ in range(100):
        lengths = [draw.randint(1, 100) for _ in range(64)]
        totals = [sum(lengths[index] for index in indices) for indices in fewest_bins(lengths, 2000)]
        assert max(totals) - min(totals) <= max(lengths)


def test_evening_out_never_breaks_the_limit() -> None:
    lengths = [5, 5, 4, 4, 3, 3, 3]  # the emptiest bin first would end at 11
    assert [sum(lengths[index] for index in indices) for indices in fewest_bins(lengths, 9)] == [9, 9, 9]


def test_a_sample_longer_than_the_limit_has_a_bin_of_its_own() -> None:
    assert fewest_bins([3, 20, 4], 10) == [[0, 2], [1]]


def test_no_limit_is_one_bin_in_the_given_order() -> None:
    assert fewest_bins([5, 900, 1], None) == [[0, 1, 2]]


@pytest.mark.parametrize("loss_average", LOSS_AVERAGES)
@pytest.mark.parametrize("limit", [None, 40])
def test_a_slice_is_the_batch_of_its_samples(limit: int | None, loss_average: str) -> None:
    for seed in range(5):
        samples = random_samples(seed)
        batch = PackedCollator(limit, loss_average)(samples)
        ordered = in_row_order(samples, batch)
        start, stop = sorted(random.Random(seed).sample(range(len(samples) + 1), 2))
        part = slice_batch(batch, start, stop)
        expected = PackedCollator(None, loss_average)(ordered[start:stop])
        assert part.keys() == expected.keys() == batch.keys()
        for key in part.keys() - {"target_weights", "loss_weight"}:
            assert_same(part[key], expected[key], key)
        if loss_average != "rank":  # which goes on to count all answers of the rank
            assert_same(part["target_weights"], expected["target_weights"], "target_weights")
        assert part["loss_weight"] == pytest.approx(float(part["target_weights"].sum()))


@pytest.mark.parametrize("loss_average", LOSS_AVERAGES)
def test_any_split_reassembles_to_the_row(loss_average: str) -> None:
    for seed in range(5):
        batch = PackedCollator(40, loss_average)(random_samples(seed))
        inner = random.Random(seed).sample(range(1, 12), seed + 1)
        cuts = [0, *sorted(inner), 12]
        parts = [slice_batch(batch, start, stop) for start, stop in pairwise(cuts)]
        for key in VIEWS:
            assert_same(torch.cat([part[key] for part in parts]), batch[key], key)
        starts = [int(batch["cu_seq_lens"][cut]) for cut in cuts[:-1]]
        for key in ("supervised_index", "image_index"):
            moved = [part[key] + start for part, start in zip(parts, starts, strict=True)]
            assert_same(torch.cat(moved), batch[key], key)
        lengths = torch.cat([torch.diff(part["cu_seq_lens"]) for part in parts])
        assert torch.equal(lengths, torch.diff(batch["cu_seq_lens"]))
        assert max(part["max_seq_len"] for part in parts) == batch["max_seq_len"]
        assert sum(part["loss_weight"] for part in parts) == pytest.approx(batch["loss_weight"])
        assert [problem for part in parts for problem in part["problems"]] == batch["problems"]


def test_a_slice_copies_nothing_big() -> None:
    batch = PackedCollator(40)(random_samples(1))
    part = slice_batch(batch, 3, 9)
    for key in VIEWS:
        assert part[key].untyped_storage().data_ptr() == batch[key].untyped_storage().data_ptr(), key


# ------------------------------------------------------------------------------------------------- out of a worker


def featured_samples() -> list[Sample]:
    """The same with features in place of images; bf16, which numpy doesn't know."""
    samples = mixed_samples()
    for sample in samples:
        num_images = len(sample.pop("pixel_values"))
        sample["image_features"] = torch.arange(num_images * 15).view(num_images, 3, 5).bfloat16()
    return samples


class AndMore(PackedCollator):
    """A collator of somebody's own, which changes a batch in the worker."""

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        batch = super().__call__(samples)
        assert type(batch) is SentBatch
        batch["doubled"] = 2 * batch["labels"]
        batch["targets"] = batch["targets"].clone()
        return batch


@pytest.mark.parametrize("strategy", ["file_descriptor", "file_system"])
@pytest.mark.parametrize("samples", [mixed_samples(), mixed_samples()[1:2], featured_samples()])
def test_a_worker_sends_the_same_batch_in_one_piece(
    samples: list[Sample], strategy: str, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(lambda: torch.multiprocessing.set_sharing_strategy("file_descriptor"))
    torch.multiprocessing.set_sharing_strategy(strategy)
    expected = PackedCollator(16)(samples)
    assert type(expected) is dict  # without a worker nothing is sent
    (batch,) = DataLoader(samples, batch_size=8, num_workers=1, collate_fn=PackedCollator(16))
    assert type(batch) is dict
    assert set(batch) == set(expected)
    for key, value in expected.items():
        assert_same(batch[key], value, key)
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor) and value.numel()]
    assert len(tensors) > 10
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert all(tensor.is_contiguous() and tensor.data_ptr() % 64 == 0 for tensor in tensors)


def test_what_a_collator_of_ones_own_changes_in_the_worker_arrives() -> None:
    expected = PackedCollator()(mixed_samples())
    (batch,) = DataLoader(mixed_samples(), batch_size=8, num_workers=1, collate_fn=AndMore())
    assert_same(batch.pop("doubled"), 2 * expected["labels"], "doubled")
    assert set(batch) == set(expected)
    for key, value in expected.items():
        assert_same(batch[key], value, key)


def test_batches_of_a_worker_do_not_share_memory_with_each_other() -> None:
    samples = [make_sample(index, 3, 2, images=1) for index in range(12)]
    batches = list(DataLoader(samples, batch_size=2, num_workers=1, collate_fn=PackedCollator()))
    for start, batch in zip(range(0, 12, 2), batches, strict=True):
        assert_same(batch["pixel_values"], PackedCollator()(samples[start : start + 2])["pixel_values"], "pixel_values")
    batches[0]["pixel_values"].zero_()
    assert batches[1]["pixel_values"][:, 0, 0, 0].tolist() == [20, 30]
