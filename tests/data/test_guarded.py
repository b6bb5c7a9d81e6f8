"""Claims about reading from a folder that stands for a bucket: each fault ends in one named error, and soon."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from shard_set import NUM_SAMPLES, build_loader, damage, read_epoch, shard_names, write_set

from composer_path.data.stream_error import StreamError


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    return write_set(tmp_path / "remote")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def fail(seconds: float = 15.0, **keywords: Any) -> StreamError:
    """The error that an epoch ends in."""
    start = time.monotonic()
    with pytest.raises(StreamError) as caught:
        loader = build_loader(**keywords)
        try:
            read_epoch(loader)
        finally:
            loader._iterator = None  # ends the workers
    assert time.monotonic() - start < seconds
    error = caught.value
    assert error.rule and error.where and error.fix
    assert error.rule in str(error) and error.where in str(error) and error.fix in str(error)
    assert len(str(error).splitlines()) == 1
    return error


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_good_set_is_read_whole_epoch_after_epoch(num_workers: int, remote: Path, cache: Path) -> None:
    loader = build_loader(num_workers, remote=str(remote), local=str(cache))
    for _ in range(2):
        assert sorted(read_epoch(loader)) == list(range(NUM_SAMPLES))
    assert shard_names(cache) == shard_names(remote)
    assert [path.name for path in cache.iterdir() if path.suffix not in (".mds", ".json")] == []


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("kind", "rule"), [("missing", "missing"), ("flipped", "hash"), ("truncated", "size")], ids=lambda value: value
)
@pytest.mark.parametrize("has_remote", [True, False], ids=["cache", "own folder"])
def test_a_bad_shard_ends_the_epoch_in_an_error_that_names_it(
    num_workers: int, kind: str, rule: str, has_remote: bool, remote: Path, cache: Path
) -> None:
    name = shard_names(remote)[5]
    damage(remote / name, kind)
    place = {"remote": str(remote), "local": str(cache)} if has_remote else {"local": str(remote)}
    error = fail(num_workers=num_workers, **place)
    assert (error.shard, error.rule, error.where) == (name, rule, str(remote))
    if has_remote:
        assert not list(cache.glob(f"{name}*"))  # nor a part of it
    else:
        assert (remote / name).exists() == (kind != "missing")  # the user's own data stay as they are
