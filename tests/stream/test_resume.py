"""Claims about a resumed run's place in the data: it is counted, and it belongs to these data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_shards import BATCH_SIZE, NUM_SAMPLES, build_loader, read_epoch, write_set

from composer_path.stream.error import StreamError


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    return write_set(tmp_path / "remote")


def test_what_is_to_come_is_the_rest_of_the_epoch(remote: Path) -> None:
    loader = build_loader(local=str(remote))
    assert loader.dataset.to_come() == (NUM_SAMPLES // BATCH_SIZE, NUM_SAMPLES)
    next(iter(loader))
    state = loader.dataset.state_dict(BATCH_SIZE, True)
    del loader
    resumed = build_loader(local=str(remote))
    resumed.dataset.load_state_dict(state)
    assert resumed.dataset.to_come() == (NUM_SAMPLES // BATCH_SIZE - 1, NUM_SAMPLES - BATCH_SIZE)
    assert len(read_epoch(resumed)) == NUM_SAMPLES - BATCH_SIZE


def test_a_checkpoint_amid_an_epoch_of_other_data_is_refused(remote: Path, tmp_path: Path) -> None:
    state = build_loader(local=str(remote)).dataset.state_dict(8, True)
    other = build_loader(local=str(write_set(tmp_path / "other", tag="b"))).dataset
    with pytest.raises(StreamError, match="data-changed: sample 8 of an epoch over other data"):
        other.load_state_dict(state)
    other.load_state_dict(state | {"sample_in_epoch": 0})  # a new epoch may have other data


# --------------------------------------------------------------------------------------------- the same order


def state_of(remote: Path, done: int = 8, **keywords: Any) -> dict[str, Any]:
    return build_loader(local=str(remote), shuffle=True, **keywords).dataset.state_dict(done, True) | {"epoch": 0}


CHANGES = {
    "shuffle_seed": ({"shuffle_seed": 9}, "shuffle_seed 9176, now 9"),
    "num_canonical_nodes": ({"num_canonical_nodes": 4}, "num_canonical_nodes 1, now 4"),
    "shuffle": ({"shuffle": False}, "shuffle py1e/auto, now none"),
    "shuffle_algo": ({"shuffle_algo": "py1s"}, "shuffle py1e/auto, now py1s/auto"),
    "shuffle_block_size": ({"shuffle_block_size": 8}, "shuffle py1e/auto, now py1e/8"),
    "epoch_size": ({"epoch_size": 50}, "samples 40, now 50"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_order_is_refused_amid_an_epoch_and_taken_at_its_end(
    name: str, remote: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keywords, words = CHANGES[name]
    state, changed = state_of(remote), {"shuffle": True, **keywords}
    message = "order-changed: sample 8 of an epoch in another order is where the checkpoint stopped"
    with pytest.raises(StreamError, match=message) as caught:
        build_loader(local=str(remote), **changed).dataset.load_state_dict(state)
    assert words in str(caught.value)
    loader = build_loader(local=str(remote), **changed)
    with caplog.at_level("INFO", "composer_path.stream.resume"):
        loader.dataset.load_state_dict(state | {"sample_in_epoch": NUM_SAMPLES})
    assert words in caplog.text
    assert read_epoch(loader) == []  # the epoch is over
    fresh = build_loader(local=str(remote), **changed)
    fresh.dataset.next_epoch = 1
    assert read_epoch(loader) == read_epoch(fresh)


def test_an_earlier_versions_checkpoint_is_refused_amid_an_epoch_alone(remote: Path) -> None:
    state = state_of(remote)
    old = {key: state[key] for key in ("epoch", "sample_in_epoch", "num_canonical_nodes", "shuffle_seed", "data_hash")}
    with pytest.raises(StreamError, match=r"\(version 1, now 2\); end that epoch with the version that began it"):
        build_loader(local=str(remote), shuffle=True).dataset.load_state_dict(old)
    loader = build_loader(local=str(remote), shuffle=True)
    loader.dataset.load_state_dict(old | {"sample_in_epoch": NUM_SAMPLES + 8})  # its order had repeated some
    assert read_epoch(loader) == [] and len(read_epoch(loader)) == NUM_SAMPLES


def test_canonical_nodes_that_were_left_out_stay_as_the_run_began(remote: Path) -> None:
    for done in (0, 8):
        loader = build_loader(local=str(remote), shuffle=True, num_canonical_nodes=None)
        assert loader.dataset.num_canonical_nodes == 1
        loader.dataset.load_state_dict(state_of(remote, done, num_canonical_nodes=8))
        assert loader.dataset.num_canonical_nodes == 8
        assert loader.dataset.state_dict(done, True)["num_canonical_nodes"] == 8


def test_what_an_epoch_holds_is_said_and_one_without_a_step_refused(tmp_path: Path) -> None:
    folder = str(write_set(tmp_path / "set", 24))
    words = "an epoch has 24 samples in 3 steps ({}: each of its 24 samples once)".format
    assert build_loader(local=folder, batch_size=10).dataset.describe_epoch() == words(folder)
    partly = build_loader(local=folder, batch_size=10, epoch_size=30, drop_last=True).dataset
    assert partly.describe_epoch().endswith("each of its 24 samples once and 6 of its 24 samples once more)")
    short = build_loader(local=folder, batch_size=10, drop_last=True).dataset
    assert short.describe_epoch().endswith("4 of them are left out (drop_last)") and short.to_come() == (2, 20)
    with pytest.raises(ValueError, match="drop_last: found a global batch of 64, and an epoch has 24 samples"):
        build_loader(local=folder, batch_size=64, drop_last=True)
    with pytest.raises(ValueError, match="num_canonical_nodes: found 25, and an epoch has 24 samples; give 1 to 24"):
        build_loader(local=folder, num_canonical_nodes=25)
    for name, value in (("replication", 2), ("batching_method", "stratified"), ("partition_algo", "orig")):
        with pytest.raises(ValueError, match=f"{name}: found {value}"):
            build_loader(local=folder, **{name: value})


def test_asking_for_the_place_leaves_no_file_open(remote: Path) -> None:
    loader = build_loader(local=str(remote))
    loader.dataset.load_state_dict(loader.dataset.state_dict(0, True))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        loader.dataset.to_come()
        loader.dataset.state_dict(4, True)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
