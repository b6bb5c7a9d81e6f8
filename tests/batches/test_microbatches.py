"""Claims about microbatches in numbers: few, even bins within the limit, and cuts at samples' borders."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import accumulate

import pytest

from composer_path.batches.microbatches import add_cuts, cap_bins, fewest_bins


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


def test_bins_are_capped_at_a_number_of_samples() -> None:
    assert cap_bins([5, 2, 1, 4], 2) == [2, 2, 1, 2, 1, 2, 2]


def test_cuts_reach_any_number_of_bins_up_to_the_number_of_samples() -> None:
    draw = random.Random(0)
    for _ in range(50):
        lengths = [draw.randint(1, 50) for _ in range(draw.randint(1, 12))]
        found = fewest_bins(lengths, draw.randint(50, 200))
        bins = [len(indices) for indices in found]
        borders = [0, *accumulate(lengths[index] for indices in found for index in indices)]
        for num_bins in range(len(bins), len(lengths) + 1):
            counts = add_cuts(bins, borders, num_bins)
            assert len(counts) == num_bins
            assert min(counts) >= 1
            assert set(accumulate(bins)) <= set(accumulate(counts))  # every old border is still one


def test_cuts_go_through_the_middle_of_the_largest_bin() -> None:
    borders = [0, *accumulate([30, 30, 10, 40, 20, 20])]
    assert add_cuts([2, 4], borders, 2) == [2, 4]
    assert add_cuts([2, 4], borders, 3) == [2, 2, 2]  # 60 | 10 40 | 20 20, not 60 | 10 | 80
    assert add_cuts([2, 4], borders, 4) == [1, 1, 2, 2]
    borders = [0, *accumulate([500, 10, 20, 40])]
    assert add_cuts([1, 3], borders, 3) == [1, 2, 1]  # a single sample stays whole, however long


def test_more_bins_than_samples_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="this rank has 2 samples, another needs 3 microbatches; set drop_last"):
        add_cuts([1, 1], [0, 5, 9], 3)
