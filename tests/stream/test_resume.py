"""Claims about a resumed run's place in the data: it is counted, and it belongs to these data."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_shards import BATCH_SIZE, NUM_SAMPLES, build_loader, read_epoch, write_set

from composer_path.stream.error import StreamError


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    return write_set(tmp_path / "remote")


def test_what_is_to_come_is_the_rest_of_the_epoch(remote: Path) -> None:
    loader = build_loader(local=str(remote))
    assert loader.dataset.samples_to_come() == NUM_SAMPLES
    next(iter(loader))
    state = loader.dataset.state_dict(BATCH_SIZE, True)
    del loader
    resumed = build_loader(local=str(remote))
    resumed.dataset.load_state_dict(state)
    assert resumed.dataset.samples_to_come() == NUM_SAMPLES - BATCH_SIZE
    assert len(read_epoch(resumed)) == NUM_SAMPLES - BATCH_SIZE


def test_a_checkpoint_amid_an_epoch_of_other_data_is_refused(remote: Path, tmp_path: Path) -> None:
    state = build_loader(local=str(remote)).dataset.state_dict(8, True)
    other = build_loader(local=str(write_set(tmp_path / "other", tag="b"))).dataset
    with pytest.raises(StreamError, match="data-changed: sample 8 of an epoch over other data"):
        other.load_state_dict(state)
    other.load_state_dict(state | {"sample_in_epoch": 0})  # a new epoch may have other data
