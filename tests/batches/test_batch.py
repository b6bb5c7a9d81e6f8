"""Claims about padding-free rows: layout, labels, loss weights, and microbatches as views."""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import FrozenInstanceError, fields, replace
from itertools import pairwise
from typing import Any, get_args

import jaxtyping
import pytest
import torch
from tiny_samples import assert_same, make_sample, mixed_samples

from composer_path import IGNORE_INDEX, IMAGE_TOKEN_ID
from composer_path.batches.batch import Batch, LossAverage, PackedCollator, Sample

LOSS_AVERAGES = get_args(LossAverage)
# Whatever isn't shifted to the slice's own start.
VIEWS = (
    *("input_ids", "position_ids", "labels", "targets", "target_weights", "pixel_values", "is_he", "image_sample_ids"),
    *("sample_ids", "num_images", "num_targets", "num_placeholders"),
)


def random_samples(seed: int, count: int = 12) -> list[Sample]:
    draw = random.Random(seed)
    return [
        make_sample(index, draw.randint(1, 12), draw.randint(0, 12), images=draw.choice([0, 0, 1, 2]))
        for index in range(count)
    ]


def in_row_order(samples: Sequence[Sample], batch: Batch) -> list[Sample]:
    by_id = {sample["sample_id"]: sample for sample in samples}
    return [by_id[sample_id] for sample_id in batch.sample_ids.tolist()]


def pieces(batch: Batch, key: str) -> list[torch.Tensor]:
    """A row's values, sample by sample."""
    return list(getattr(batch, key).split(torch.diff(batch.cu_seq_lens).tolist()))


@pytest.mark.parametrize("limit", [None, 16])
def test_samples_lie_one_behind_the_other_and_positions_restart(limit: int | None) -> None:
    samples = mixed_samples()
    batch = PackedCollator(limit)(samples)
    assert sorted(batch.sample_ids.tolist()) == [0, 1, 2, 3, 4]
    ordered = in_row_order(samples, batch)
    lengths = [len(sample["input_ids"]) for sample in ordered]
    assert batch.cu_seq_lens.dtype == torch.int32
    assert batch.cu_seq_lens.tolist() == [sum(lengths[:at]) for at in range(6)]
    assert batch.max_seq_len == max(lengths) == 12
    rows = zip(ordered, pieces(batch, "input_ids"), pieces(batch, "position_ids"), strict=True)
    for sample, input_ids, position_ids in rows:
        assert torch.equal(input_ids, sample["input_ids"])
        assert position_ids.tolist() == list(range(len(input_ids)))
    assert [sample["source"] for sample in ordered] == batch.sources
    assert [sample["problem"] for sample in ordered] == batch.problems
    if limit is None:
        assert batch.sample_ids.tolist() == [0, 1, 2, 3, 4]
        assert batch.samples_per_bin == [5]
    else:
        assert len(batch.samples_per_bin) > 1
        assert sum(batch.samples_per_bin) == 5


def test_labels_are_shifted_inside_each_sample_and_never_across() -> None:
    samples = mixed_samples()
    assert samples[4]["labels"][0] != IGNORE_INDEX  # what a shift of the whole row would hand to sample 3's last token
    batch = PackedCollator()(samples)
    for sample, labels in zip(samples, pieces(batch, "labels"), strict=True):
        assert labels.tolist() == [*sample["labels"][1:].tolist(), IGNORE_INDEX]


def test_each_target_is_the_token_after_its_position() -> None:
    batch = PackedCollator(16)(mixed_samples())
    index, targets = batch.supervised_index, batch.targets
    assert torch.equal(targets, batch.labels[index])
    assert torch.equal(targets, batch.input_ids[index + 1])
    assert torch.equal(index, (batch.labels != IGNORE_INDEX).nonzero()[:, 0])
    assert batch.num_targets.sum() == len(targets) == len(batch.target_weights)
    # The first token of a sample is nobody's target, so sample 4 (an answer alone) has one fewer than it has labels.
    counts = dict(zip(batch.sample_ids.tolist(), batch.num_targets.tolist(), strict=True))
    assert counts == {0: 3, 1: 9, 2: 1, 3: 0, 4: 5}


def test_images_stay_with_their_sample_in_order() -> None:
    batch = PackedCollator(16)(mixed_samples())
    assert torch.equal(batch.image_index, (batch.input_ids == IMAGE_TOKEN_ID).nonzero()[:, 0])
    counts = zip(batch.sample_ids.tolist(), batch.num_images.tolist(), batch.num_placeholders.tolist(), strict=True)
    assert sorted(counts) == [(0, 1, 3), (1, 0, 0), (2, 2, 6), (3, 0, 0), (4, 0, 0)]
    order = [sample_id for sample_id in batch.sample_ids.tolist() if sample_id in (0, 2)]
    marks = {0: [0], 2: [20, 21]}
    assert batch.pixel_values.dtype == torch.uint8
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [mark for sample_id in order for mark in marks[sample_id]]
    assert batch.image_sample_ids.tolist() == [sample_id for sample_id in order for _ in marks[sample_id]]


def test_stain_is_known_for_each_image() -> None:
    batch = PackedCollator()([make_sample(0, 1, 1, images=2), make_sample(1, 1, 1, images=1), make_sample(2, 1, 1)])
    assert batch.is_he.tolist() == [True, True, False]


def test_a_batch_of_text_only_has_no_images() -> None:
    batch = PackedCollator()([make_sample(0, 2, 2), make_sample(1, 3, 1)])
    assert batch.pixel_values.shape == (0, 3, 2, 2)
    assert [len(getattr(batch, key)) for key in ("is_he", "image_index", "image_sample_ids")] == [0, 0, 0]
    assert batch.num_images.tolist() == [0, 0]


def test_a_sample_that_cannot_be_used_keeps_its_slot_with_weight_0() -> None:
    usable = mixed_samples()
    del usable[3]
    for loss_average in LOSS_AVERAGES:
        batch = PackedCollator(loss_average=loss_average)(mixed_samples())
        without = PackedCollator(loss_average=loss_average)(usable)
        assert len(batch.num_images) == 5
        assert batch.problems == [None, None, None, "unreadable-image", None]
        assert_same(batch.targets, without.targets, "targets")
        assert_same(batch.target_weights, without.target_weights, "target_weights")
        assert batch.loss_weight == without.loss_weight


def test_a_batch_without_an_answer_weighs_nothing() -> None:
    for loss_average in LOSS_AVERAGES:
        batch = PackedCollator(loss_average=loss_average)([make_sample(0, 3, 0), make_sample(1, 2, 0)])
        assert batch.loss_weight == 0
        assert batch.targets.shape == batch.target_weights.shape == (0,)


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
    weights = batch.target_weights.split(batch.num_targets.tolist())
    assert batch.target_weights.dtype == torch.float32
    for sample_id, of_sample in zip(batch.sample_ids.tolist(), weights, strict=True):
        assert len(of_sample) == answers[sample_id]
        assert of_sample.tolist() == pytest.approx([weight_of(answers[sample_id]) for _ in of_sample])
    assert batch.loss_weight == pytest.approx(total)


@pytest.mark.parametrize(
    ("loss_average", "weight_of"),
    [
        ("token", lambda own, total: 1.0),
        ("sample", lambda own, total: 1 / own),
        ("square", lambda own, total: own**-0.5),
        ("rank", lambda own, total: 1 / total),
    ],
)
def test_a_label_of_half_weight_is_half_a_target(loss_average: str, weight_of: Any) -> None:
    plain, weighed = make_sample(0, 3, 4), make_sample(1, 2, 6)
    weighed["label_weights"] = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25])
    batch = PackedCollator(None, loss_average)([plain, weighed])
    own = {0: [1.0] * 4, 1: [1.0, 1.0, 0.5, 0.5, 0.5, 0.25]}
    total = sum(own[0]) + sum(own[1])
    weights = batch.target_weights.split(batch.num_targets.tolist())
    for sample_id, of_sample in zip(batch.sample_ids.tolist(), weights, strict=True):
        factor = weight_of(sum(own[sample_id]), total)
        assert of_sample.tolist() == pytest.approx([factor * one for one in own[sample_id]])
    alone = PackedCollator(None, loss_average)([plain]).target_weights
    if loss_average != "rank":
        assert torch.equal(weights[batch.sample_ids.tolist().index(0)], alone)


def test_an_unknown_loss_average_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    with pytest.raises(ValueError, match="unknown 'tokens'; choose one of token, sample, square, rank"):
        PackedCollator(loss_average="tokens")


@pytest.mark.parametrize("loss_average", LOSS_AVERAGES)
@pytest.mark.parametrize("limit", [None, 40])
def test_a_slice_is_the_batch_of_its_samples(limit: int | None, loss_average: str) -> None:
    for seed in range(5):
        samples = random_samples(seed)
        batch = PackedCollator(limit, loss_average)(samples)
        ordered = in_row_order(samples, batch)
        start, stop = sorted(random.Random(seed).sample(range(len(samples) + 1), 2))
        part = batch.cut(start, stop)
        expected = PackedCollator(None, loss_average)(ordered[start:stop])
        for key in vars(part).keys() - {"target_weights", "loss_weight"}:
            assert_same(getattr(part, key), getattr(expected, key), key)
        if loss_average != "rank":  # which goes on to count all answers of the rank
            assert_same(part.target_weights, expected.target_weights, "target_weights")
        assert part.loss_weight == pytest.approx(float(part.target_weights.sum()))


@pytest.mark.parametrize("loss_average", LOSS_AVERAGES)
def test_any_split_reassembles_to_the_row(loss_average: str) -> None:
    for seed in range(5):
        batch = PackedCollator(40, loss_average)(random_samples(seed))
        inner = random.Random(seed).sample(range(1, 12), seed + 1)
        cuts = [0, *sorted(inner), 12]
        parts = [batch.cut(start, stop) for start, stop in pairwise(cuts)]
        for key in VIEWS:
            assert_same(torch.cat([getattr(part, key) for part in parts]), getattr(batch, key), key)
        starts = [int(batch.cu_seq_lens[cut]) for cut in cuts[:-1]]
        for key in ("supervised_index", "image_index"):
            moved = [getattr(part, key) + start for part, start in zip(parts, starts, strict=True)]
            assert_same(torch.cat(moved), getattr(batch, key), key)
        lengths = torch.cat([torch.diff(part.cu_seq_lens) for part in parts])
        assert torch.equal(lengths, torch.diff(batch.cu_seq_lens))
        assert max(part.max_seq_len for part in parts) == batch.max_seq_len
        assert sum(part.loss_weight for part in parts) == pytest.approx(batch.loss_weight)
        assert [problem for part in parts for problem in part.problems] == batch.problems


def test_a_slice_copies_nothing_big() -> None:
    batch = PackedCollator(40)(random_samples(1))
    part = batch.cut(3, 9)
    for key in VIEWS:
        assert getattr(part, key).untyped_storage().data_ptr() == getattr(batch, key).untyped_storage().data_ptr(), key


def test_every_field_says_what_it_has_one_entry_of() -> None:
    batch = PackedCollator(16)(mixed_samples())
    counts = {"token": 40, "border": 6, "target": 18, "placeholder": 9, "image": 3, "sample": 5}
    for field in fields(Batch):
        value, per = getattr(batch, field.name), field.metadata["per"]
        assert value is None or per == "batch" or len(value) == counts[per], field.name
    assert {field.name for field in fields(Batch) if "index" in field.metadata} == {
        *("cu_seq_lens", "supervised_index", "image_index")
    }


def test_a_batch_is_replaced_and_never_changed() -> None:
    batch = PackedCollator()(mixed_samples())
    with pytest.raises(FrozenInstanceError):
        batch.max_seq_len = 1  # type: ignore[misc]
    assert deepcopy(batch) is batch  # Composer copies every microbatch
    other = replace(batch, pixel_values=255 - batch.pixel_values)
    assert other.targets is batch.targets
    assert not torch.equal(other.pixel_values, batch.pixel_values)
