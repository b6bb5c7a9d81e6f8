"""Random numbers that depend on seed, epoch, sample and repetition alone: the same for any ranks, workers and split."""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from composer_path.batches.batch import Batch

# SplitMix64's constants as signed 64-bit integers, torch's only 64-bit kind.
_GOLDEN_GAMMA, _MIX_1, _MIX_2 = (
    constant - (1 << 64) for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
_PLACES = 1 << 32  # a sample has fewer images, or tokens


def draw_uniform(
    key: int, sample_ids: Int64[Tensor, " entries"], places: Int64[Tensor, " entries"], num_draws: int
) -> Float[Tensor, "entries draws"]:
    """Draw numbers from 0 up to 1 that depend on nothing but the arguments, the same on every kind of device.

    A counter-based generator: counters are mixed by SplitMix64's finaliser (Steele et al., OOPSLA 2014) in
    64-bit integers that wrap around; the upper 24 bits become the fraction. No state, no wait.
    """
    counters = torch.arange(num_draws, device=sample_ids.device)
    mixed = _mix(_mix(_mix(sample_ids + key) + places)[:, None] + counters)
    return _shift_right(mixed, 40).float() * 2.0**-24


def draw_for_images(key: int, batch: Batch, num_draws: int, of_a_sample: bool = False) -> Float[Tensor, "images draws"]:
    """Numbers for each image of a batch, by its sample, the sample's repetition and its place in the sample.

    With `of_a_sample` the place doesn't matter.
    """
    places = places_in_samples(batch.num_images, len(batch.is_he)) * (not of_a_sample)
    repetitions = batch.repetitions.repeat_interleave(batch.num_images, output_size=len(batch.is_he))
    return draw_uniform(key, batch.image_sample_ids, places + repetitions * _PLACES, num_draws)


def places_in_samples(counts: Int64[Tensor, " samples"], total: int) -> Int64[Tensor, " entries"]:
    """Number the entries inside each sample: 0, 1, …, 0, 1, … (a sample may occur twice in a row)."""
    first = counts.cumsum(0) - counts
    # With the total given, the device is not asked for it.
    first_of_entry = first.repeat_interleave(counts, output_size=total)
    return torch.arange(total, device=first.device) - first_of_entry


def key_of(seed: int, epoch: int, name: str = "") -> int:
    """Fold seed, epoch and who draws into one number below 2**62, in plain integers."""
    digest = hashlib.blake2b(f"{seed} {epoch}{name and ' ' + name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 2


def _mix(values: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    values = values + _GOLDEN_GAMMA
    values = (values ^ _shift_right(values, 30)) * _MIX_1
    values = (values ^ _shift_right(values, 27)) * _MIX_2
    return values ^ _shift_right(values, 31)


def _shift_right(values: Int64[Tensor, "*shape"], bits: int) -> Int64[Tensor, "*shape"]:
    """Shift without copies of the sign bit, which torch's shift of a signed integer brings in."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
