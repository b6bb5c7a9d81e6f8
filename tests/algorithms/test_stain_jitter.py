"""Stain jitter: what it does to colours, what it leaves alone, and that nothing but the sample decides it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from composer import ComposerModel, DataSpec, Trainer
from composer.core import Event, State, Timestamp
from composer.devices import DeviceCPU
from composer.loggers import Logger
from torch import Tensor
from torch.utils.data import DataLoader

from composer_path.algorithms import StainJitter
from composer_path.algorithms.draws import draw_uniform
from composer_path.algorithms.stain_jitter import jitter_stain
from composer_path.batches.batch import Batch, PackedCollator, Sample, split_batch

ONES, ZEROS = torch.ones(1, 3), torch.zeros(1, 3)
HAEMATOXYLIN = torch.tensor([0.650, 0.704, 0.286])
EOSIN = torch.tensor([0.072, 0.990, 0.105])
# Images of each sample of the small data set: text-only, one, two and three images.
NUM_IMAGES = [1, 2, 0, 3, 1, 1, 2, 0]


def stained(haematoxylin: float, eosin: float) -> Tensor:
    """One pixel of a given amount of each stain, by Beer and Lambert's law."""
    density = haematoxylin * HAEMATOXYLIN / HAEMATOXYLIN.norm() + eosin * EOSIN / EOSIN.norm()
    return (256 * 10**-density - 1).round().to(torch.uint8)[None, :, None, None]


def sample(index: int) -> Sample:
    """A sample of the loader; every second one is H&E."""
    num_images = NUM_IMAGES[index]
    pixels = torch.randint(0, 256, (num_images, 3, 8, 8), generator=torch.Generator().manual_seed(index))
    return Sample(
        sample_id=index,
        input_ids=torch.ones(2, dtype=torch.int64),
        labels=torch.ones(2, dtype=torch.int64),
        pixel_values=pixels.to(torch.uint8),
        is_he=torch.full((num_images,), index % 2 == 1),
        source="all",
        problem=None,
    )


def batch_of(*indices: int) -> Batch:
    return PackedCollator()([sample(index) for index in indices])


class Recorder(ComposerModel):
    """Keeps every image that reaches it, by phase, sample and place in the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: dict[tuple, Tensor] = {}

    def forward(self, batch: Batch) -> Tensor:
        images = iter(batch.pixel_values.clone())
        for sample_id, num_images in zip(batch.sample_ids.tolist(), batch.num_images.tolist(), strict=True):
            for place in range(num_images):
                key = ("train" if self.training else "eval", sample_id, place)
                assert key not in self.seen
                self.seen[key] = next(images)
        return self.weight * batch.pixel_values.float().sum() / 1e6

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return outputs

    def eval_forward(self, batch: Batch, outputs: Tensor | None = None) -> Tensor:
        return self(batch)

    def get_metrics(self, is_train: bool = False) -> dict:
        return {}


def jittered(batch: Batch, epoch: int = 0, **settings) -> Tensor:
    state = State(model=Recorder(), rank_zero_seed=0, run_name="jitter", device=DeviceCPU())
    state.timestamp = Timestamp(epoch=epoch)
    state.batch = batch
    algorithm = StainJitter(**{"strength": 0.3, "shift": 0.02, "probability": 1.0, **settings})
    algorithm.apply(Event.BEFORE_FORWARD, state, Logger(state))
    return state.batch.pixel_values


def test_factors_of_one_give_every_colour_back_exactly() -> None:
    levels = torch.arange(0, 256, 3)
    colors = torch.cartesian_prod(levels, levels, levels).to(torch.uint8).T[None, :, None].contiguous()
    assert torch.equal(jitter_stain(colors, ONES, ZEROS), colors)


def test_more_haematoxylin_is_what_beer_and_lambert_say() -> None:
    for haematoxylin, eosin in ((0.5, 0.2), (0.1, 0.6), (0.8, 0.0)):
        result = jitter_stain(stained(haematoxylin, eosin), torch.tensor([[1.2, 0.9, 1.0]]), ZEROS)
        expected = stained(1.2 * haematoxylin, 0.9 * eosin)
        # Measured: 1 grey level, from rounding the pixel that goes in.
        assert (result.int() - expected.int()).abs().max() <= 1
    shifted = jitter_stain(stained(0.5, 0.2), ONES, torch.tensor([[0.1, 0.05, 0.0]]))
    assert (shifted.int() - stained(0.6, 0.25).int()).abs().max() <= 1


def test_blank_black_and_single_colour_tiles_do_not_fail() -> None:
    for level in (0, 1, 128, 255):
        tile = torch.full((1, 3, 4, 4), level, dtype=torch.uint8)
        for factor in (0.0, 0.7, 1.3, 2.0):
            result = jitter_stain(tile, torch.full((1, 3), factor), torch.tensor([[0.02, -0.02, 0.02]]))
            assert (result == result[:, :, :1, :1]).all()
    white = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    assert torch.equal(jitter_stain(white, torch.full((1, 3), 1.4), ZEROS), white)
    assert jitter_stain(white, ONES, torch.full((1, 3), 0.01)).min() == 242  # as the docstring says: 13 levels


def test_only_images_known_to_be_he_are_changed() -> None:
    batch = batch_of(*range(len(NUM_IMAGES)))
    result = jittered(batch)
    changed = (result != batch.pixel_values).flatten(1).any(1)
    assert result.dtype == torch.uint8
    assert batch.is_he.any()
    assert torch.equal(changed, batch.is_he)


def test_the_batch_itself_is_left_as_it_was() -> None:
    batch = batch_of(1, 3)
    before = batch.pixel_values.clone()
    first, again = jittered(batch), jittered(batch)
    assert torch.equal(batch.pixel_values, before)
    assert torch.equal(first, again)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_batch_gets_the_same_jitter_however_it_is_split(size: int) -> None:
    batch = batch_of(*range(len(NUM_IMAGES)))
    parts = [jittered(part) for part in split_batch(batch, size)]
    assert torch.equal(torch.cat(parts), jittered(batch))


def test_order_of_samples_and_neighbours_do_not_matter() -> None:
    alone = jittered(batch_of(3))
    among = jittered(batch_of(1, 3, 3, 5))
    assert torch.equal(among[2:5], alone)
    assert torch.equal(among[5:8], alone)  # the same sample again, right behind itself


def test_images_of_a_sample_epochs_and_seeds_differ() -> None:
    batch = batch_of(3)
    same = replace(batch, pixel_values=batch.pixel_values[:1].expand(3, -1, -1, -1))
    first, second, third = jittered(same)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert not torch.equal(jittered(same, epoch=1), jittered(same))
    assert not torch.equal(jittered(same, seed=18), jittered(same))


def test_probability_is_the_share_of_images_that_change() -> None:
    blank = torch.full((1, 3, 2, 2), 120, dtype=torch.uint8)
    one = sample(1) | {"pixel_values": blank, "is_he": torch.ones(1, dtype=torch.bool)}
    batch = PackedCollator()([one | {"sample_id": index} for index in range(1000)])
    share = (jittered(batch, probability=0.3) != 120).flatten(1).any(1).float().mean()
    assert abs(share - 0.3) < 0.05
    assert torch.equal(jittered(batch, probability=0.0), batch.pixel_values)


def test_a_microbatch_without_images_is_left_alone() -> None:
    assert jittered(batch_of(2)).shape == (0, 3, 8, 8)


def test_draws_are_uniform_and_independent() -> None:
    draws = draw_uniform(17, torch.arange(50_000), torch.zeros(50_000, dtype=torch.int64), 7)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert (draws.mean(0) - 0.5).abs().max() < 0.01
    assert (draws.std(0) - 12**-0.5).abs().max() < 0.01
    assert torch.corrcoef(draws.T).fill_diagonal_(0).abs().max() < 0.02


def test_draws_are_splitmix64_on_any_machine_so_that_a_resumed_run_goes_on_alike() -> None:
    expected = [splitmix64(splitmix64(splitmix64(17 + 5) + 1) + draw) >> 40 for draw in range(3)]
    assert (draw_uniform(17, torch.tensor([5]), torch.tensor([1]), 3) * 2**24).long().tolist() == [expected]


def splitmix64(value: int) -> int:
    """The published algorithm in plain integers."""
    mask = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


@pytest.mark.parametrize("name", ["strength", "shift", "probability"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"stain_jitter: {name} must lie between 0 and 1, found {value}"):
        StainJitter(**{name: value})


def train_and_record(microbatch_size: int) -> dict[tuple, Tensor]:
    def spec() -> DataSpec:
        samples = [sample(index) for index in range(len(NUM_IMAGES))]
        loader = DataLoader(samples, batch_size=4, collate_fn=PackedCollator())  # type: ignore[arg-type]
        return DataSpec(loader, split_batch=split_batch, get_num_samples_in_batch=lambda batch: len(batch.sample_ids))

    model = Recorder()
    trainer = Trainer(
        model=model,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.0),
        train_dataloader=spec(),
        eval_dataloader=spec(),
        eval_interval="1ep",
        max_duration="1ep",
        device="cpu",
        device_train_microbatch_size=microbatch_size,
        algorithms=[StainJitter(strength=0.3, shift=0.02, probability=1.0)],
        progress_bar=False,
        log_to_console=False,
    )
    trainer.fit()  # ends with an evaluation
    trainer.close()
    return model.seen


def test_in_a_real_trainer_microbatches_give_the_same_pixels_and_evaluation_is_untouched() -> None:
    whole, halves = train_and_record(4), train_and_record(2)
    assert len(whole) == 2 * sum(NUM_IMAGES)
    assert whole.keys() == halves.keys()
    for (phase, sample_id, place), pixels in whole.items():
        assert torch.equal(pixels, halves[phase, sample_id, place])
        changed = not torch.equal(pixels, sample(sample_id)["pixel_values"][place])
        assert changed == (phase == "train" and sample_id % 2 == 1)


@pytest.mark.gpu
def test_on_the_device_nothing_waits_and_the_draws_are_those_of_the_cpu() -> None:
    batch = batch_of(*range(len(NUM_IMAGES)))
    on_device = batch.to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = jittered(on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (result.cpu().int() - jittered(batch).int()).abs().max() <= 1
