"""What all algorithms that change images keep: nothing but the sample decides what its images get."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Event, State, Timestamp
from composer.devices import DeviceCPU
from composer.loggers import Logger
from test_stain_jitter import NUM_IMAGES, Recorder, sample
from tiny_run import convert_shards
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from composer_path.algorithms import Dihedral, ImageDropout, MppJitter, StainJitter, StainTransfer
from composer_path.algorithms.image_algorithm import ImageAlgorithm
from composer_path.batches.batch import Batch, PackedCollator, split_batch
from composer_path.batches.dataset import ConversationDataset
from composer_path.records.wording import Wording

ALGORITHMS = [
    Dihedral(),
    ImageDropout(0.5),
    MppJitter(0.3, 1.0),
    StainJitter(0.3, 0.02, 1.0),
    StainTransfer([-0.6, 0.02, 0.02], [0.2, 0.03, 0.02], 0.5),
]
EVERY_KIND = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda one: type(one).__name__)


def batch_of(*indices: int, repetition: int = 0, **more: Any) -> Batch:
    """H&E samples."""
    made = [sample(index) | {"repetition": repetition} | more for index in indices]
    return PackedCollator()([one | {"is_he": torch.ones_like(one["is_he"])} for one in made])  # type: ignore[misc]


def changed(algorithm: ImageAlgorithm, batch: Batch, epoch: int = 0) -> Tensor:
    state = State(model=Recorder(), rank_zero_seed=0, run_name="images", device=DeviceCPU())
    state.timestamp, state.batch = Timestamp(epoch=epoch), batch
    algorithm.apply(Event.BEFORE_FORWARD, state, Logger(state))
    return state.batch.pixel_values


@EVERY_KIND
@pytest.mark.parametrize("size", [1, 2, 3])
def test_images_are_the_same_however_a_batch_is_split(algorithm: ImageAlgorithm, size: int) -> None:
    batch = batch_of(*range(len(NUM_IMAGES)))
    before = batch.pixel_values.clone()
    parts = [changed(algorithm, part) for part in split_batch(batch, size)]
    whole = changed(algorithm, batch)
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(batch.pixel_values, before)
    assert not torch.equal(whole, before)


@EVERY_KIND
def test_order_and_neighbours_do_not_matter(algorithm: ImageAlgorithm) -> None:
    assert torch.equal(changed(algorithm, batch_of(1, 3, 5))[2:5], changed(algorithm, batch_of(3)))


@EVERY_KIND
def test_a_repetition_and_another_epoch_get_other_images(algorithm: ImageAlgorithm) -> None:
    every = range(len(NUM_IMAGES))
    first = changed(algorithm, batch_of(*every))
    assert not torch.equal(changed(algorithm, batch_of(*every, repetition=1)), first)
    assert not torch.equal(changed(algorithm, batch_of(*every), epoch=1), first)


@EVERY_KIND
def test_evaluation_and_rows_without_images_are_left_alone(algorithm: ImageAlgorithm) -> None:
    state = State(model=Recorder(), rank_zero_seed=0, run_name="images", device=DeviceCPU())
    assert not algorithm.match(Event.EVAL_BEFORE_FORWARD, state)
    assert changed(algorithm, batch_of(2)).shape == (0, 3, 8, 8)


@EVERY_KIND
def test_it_says_that_it_needs_images(algorithm: ImageAlgorithm) -> None:
    assert algorithm.changes_images


def test_two_algorithms_draw_independent_numbers() -> None:
    batch = batch_of(1)
    states = State(model=Recorder(), rank_zero_seed=0, run_name="images", device=DeviceCPU())
    draws = [float(one.draw(batch, states)[0, 0]) for one in ALGORITHMS]
    assert len(set(draws)) == len(ALGORITHMS)


@pytest.mark.parametrize("kind", [Dihedral, ImageDropout, MppJitter, StainJitter])
def test_a_share_out_of_range_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"probability must lie between 0 and 1, found 1\.5"):
        kind(probability=1.5)


def test_dihedral_makes_eight_pictures_of_one_and_moves_pixels_only() -> None:
    found = {tuple(changed(Dihedral(seed=seed), batch_of(0)).flatten().tolist()) for seed in range(100)}
    assert len(found) == 8
    assert len({tuple(sorted(one)) for one in found}) == 1


def test_dihedral_turns_images_of_a_sample_alike() -> None:
    batch = batch_of(3)
    same = replace(batch, pixel_values=batch.pixel_values[:1].expand(3, -1, -1, -1))
    for seed in range(8):
        first, second, third = changed(Dihedral(seed=seed), same)
        assert torch.equal(first, second) and torch.equal(second, third)


@pytest.mark.parametrize(
    ("algorithm", "wording"), [(Dihedral(), Wording(True, False)), (MppJitter(0.3, 1.0), Wording(False, True))]
)
def test_images_whose_text_speaks_of_it_stay(algorithm: ImageAlgorithm, wording: Wording) -> None:
    every = range(len(NUM_IMAGES))
    batch = batch_of(*every, wording=wording)
    assert torch.equal(changed(algorithm, batch), batch.pixel_values)
    other = batch_of(*every, wording=Wording(*(not one for one in wording)))
    assert not torch.equal(changed(algorithm, other), batch.pixel_values)


def test_image_dropout_counts_what_it_blanks() -> None:
    algorithm, noted = ImageDropout(0.5), []
    state = State(model=Recorder(), rank_zero_seed=0, run_name="images", device=DeviceCPU())
    state.timestamp = Timestamp(epoch=1)
    batch = batch_of(*range(len(NUM_IMAGES)))

    class Log(Logger):
        def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
            noted.append(metrics)

    state.batch = batch
    algorithm.apply(Event.BATCH_START, state, Log(state))
    blank = int((changed(algorithm, batch, epoch=1) == 255).flatten(1).all(1).sum())
    assert noted == [{"image_dropout/images": blank, "image_dropout/images_so_far": blank}]
    assert 0 < blank < len(batch.is_he)


def test_mpp_jitter_enlarges_about_the_centre_within_its_bounds() -> None:
    from composer_path.algorithms.mpp_jitter import zoom

    ramp = torch.arange(64, dtype=torch.uint8).expand(1, 3, 64, 64).contiguous() * 4
    assert torch.equal(zoom(ramp, torch.ones(1)), ramp)
    twice = zoom(ramp, torch.full((1,), 2.0))[0, 0, 32]
    assert twice.float().diff()[5:-5].mean() == pytest.approx(2, abs=0.05)  # half the slope
    assert abs(int(twice[31]) + int(twice[32]) - int(ramp[0, 0, 0, 31]) - int(ramp[0, 0, 0, 32])) <= 1


def test_a_repeated_sample_has_each_number_once_for_any_workers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The same pairs of sample and repetition in each step: what an image gets is then the same too."""
    shards = convert_shards(tmp_path_factory.getbasetemp() / "shards")
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "test_data" / "tokenizer")

    def steps(num_workers: int) -> list[list[tuple[int, int]]]:
        dataset = ConversationDataset(
            tokenizer=tokenizer,
            num_image_tokens=4,
            image_size=16,
            streams={"one": {"local": str(shards / "text"), "repeat": 3.0}},
            batch_size=6,
            shuffle=True,
            num_canonical_nodes=1,
        )
        loader: Any = DataLoader(dataset, batch_size=6, num_workers=num_workers, collate_fn=PackedCollator())
        pairs = [zip(batch.sample_ids.tolist(), batch.repetitions.tolist(), strict=True) for batch in loader]
        return [sorted(pair) for pair in pairs]

    alone = steps(0)
    assert sorted(pair for step in alone for pair in step) == [
        (sample_id, repetition) for sample_id in range(6) for repetition in range(3)
    ]
    assert steps(2) == alone
