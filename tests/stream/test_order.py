"""Claims about an epoch's order as a function: shares of streams, turns of stretches, what ranks and workers get."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest
from streaming.base.shuffle.py1s import divide_spans
from streaming.base.world import World

from composer_path.stream.order import NOTHING, STAND_IN, check_setting, deal, stream_shares, take_turns


@pytest.mark.parametrize(
    ("sizes", "wanted", "epoch_size", "shares"),
    [
        ([7], [{}], None, [7]),
        ([7], [{}], 10, [10]),
        ([100, 13], [{"repeat": 0.29}, {"repeat": 1.5}], None, [29, 19]),  # 0.29 * 100 is below 29 in floats
        ([5, 9], [{"choose": 12}, {}], None, [12, 9]),
        ([10, 30], [{"proportion": 1}, {"proportion": 1}], None, [20, 20]),
        ([10, 30, 5], [{"proportion": 1}, {"proportion": 1}, {"proportion": 1}], 10, [4, 3, 3]),
        ([1, 2], [{}, {}], 10, [3, 7]),
    ],
)
def test_streams_bring_the_shares_that_they_state(
    sizes: list[int], wanted: list[dict[str, float]], epoch_size: int | None, shares: list[int]
) -> None:
    assert stream_shares(sizes, wanted, epoch_size) == shares


def test_a_stream_without_a_sample_and_a_share_said_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="stream 2 of 2: none of its 3 samples is in an epoch"):
        stream_shares([5, 3], [{}, {"repeat": 0.1}])
    with pytest.raises(ValueError, match="epoch_size: found 9 beside repeat or choose"):
        stream_shares([5, 3], [{}, {"repeat": 2.0}], 9)


def test_stretches_are_those_of_streamings_shuffles_and_take_turns() -> None:
    for size, stretches in product(range(1, 40), range(1, 12)):
        if stretches > size:
            continue
        places, owners = take_turns(size, stretches)
        assert sorted(places.tolist()) == list(range(size))
        spans, supers = divide_spans([(0, size)], size, stretches)
        for owner, (begin, end) in enumerate(supers):
            found = sorted(places[owners == owner].tolist())
            assert found == [place for span in spans[begin:end] for place in range(*span)]
        whole = size // stretches * stretches
        assert owners[:whole].tolist() == list(range(stretches)) * (size // stretches)


def test_any_nodes_ranks_and_workers_get_each_sample_once_in_the_same_global_batches() -> None:
    draw = random.Random(0)
    for _ in range(300):
        nodes, ranks, workers = draw.randint(1, 3), draw.randint(1, 3), draw.randint(1, 4)
        size, batch = draw.randint(1, 90), nodes * ranks * draw.randint(1, 4)
        places, owners = take_turns(size, draw.randint(1, size))
        work = deal(places, owners, batch, World(nodes, ranks, workers, 0))
        assert work.shape[:3] == (nodes, ranks, workers) and work.shape[4] == batch // (nodes * ranks)
        for step, at in enumerate(range(0, size, batch)):
            here = work[:, :, step % workers, step // workers]
            assert sorted(here[here >= 0].tolist()) == sorted(places[at : at + batch].tolist())
            slots = (here != NOTHING).sum(axis=-1)
            assert (slots == slots[0, 0]).all() and ((here == STAND_IN).sum(axis=-1) <= 1).all()
        assert (work != NOTHING).any(axis=(0, 1, 4)).sum() == -(-size // batch)  # no step more


def test_a_node_reads_only_the_stretches_that_are_its_own() -> None:
    places, owners = take_turns(101, 4)
    work = deal(places, owners, 8, World(2, 2, 3, 0))
    read = [set(owners[np.isin(places, node)].tolist()) for node in work[..., :-1, :]]  # but for the last batches
    assert read == [{0, 1}, {2, 3}]


def test_an_epoch_without_what_is_done_is_its_rest() -> None:
    places, owners = take_turns(50, 3)
    whole = deal(places, owners, 6, World(1, 2, 1, 0))
    rest = deal(places[18:], owners[18:], 6, World(1, 2, 1, 0))
    assert np.array_equal(whole[:, :, :, 3:], rest)


@pytest.mark.parametrize("value", ["stratified", "per_stream", "device_per_stream"])
def test_batches_by_stream_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match=f"found {value}, which leaves out what doesn't fill a batch"):
        check_setting("batching_method", value)


def test_what_changes_nothing_is_accepted() -> None:
    for name, value in (("batching_method", "random"), ("partition_algo", "relaxed"), ("replication", 1)):
        check_setting(name, value)
        check_setting(name, None)
