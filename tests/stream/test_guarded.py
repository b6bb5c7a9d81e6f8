"""Claims about reading from a folder that stands for a bucket: each fault ends in one named error, and soon."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from session_processes import processes_of, wait_until_gone
from streaming.base.dataset import _ShardState
from tiny_shards import NUM_SAMPLES, build_loader, damage, end_workers, read_epoch, shard_names, write_set
from warm_process import popen

from composer_path.stream.error import StreamError
from composer_path.stream.guarded import GuardedStreamingDataset


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    return write_set(tmp_path / "remote")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def fail(seconds: float = 15.0, **keywords: object) -> StreamError:
    """The error that an epoch ends in."""
    start = time.monotonic()
    with pytest.raises(StreamError) as caught:
        loader = build_loader(**keywords)  # type: ignore[arg-type]
        try:
            read_epoch(loader)
        finally:
            end_workers(loader)
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
    end_workers(loader)
    assert shard_names(cache) == shard_names(remote)
    assert [path.name for path in cache.iterdir() if path.suffix not in (".mds", ".json")] == []


@pytest.mark.parametrize("name", ["../other/shard.00000.mds", "OTHER", "a/../../other/shard.00000.mds"])
@pytest.mark.parametrize("has_remote", [True, False], ids=["cache", "own folder"])
def test_an_index_leads_nowhere_out_of_its_folder(name: str, has_remote: bool, remote: Path, cache: Path) -> None:
    other = write_set(remote.parent / "other") / "shard.00000.mds"
    index = json.loads((remote / "index.json").read_text())
    index["shards"][0]["raw_data"]["basename"] = name.replace("OTHER", str(other))
    if has_remote:  # nor does the one that lies in the cache, when it is renewed
        cache.mkdir()
        (cache / "index.json").write_text(json.dumps(index))
        build_loader(remote=str(remote), local=str(cache))
    (remote / "index.json").write_text(json.dumps(index))
    with pytest.raises(StreamError, match="a shard outside of the folder"):
        build_loader(**({"remote": str(remote), "local": str(cache)} if has_remote else {"local": str(remote)}))
    assert other.is_file()


class Asked(GuardedStreamingDataset):
    """Notes which shards its thread asks for, ahead of the samples."""

    def prepare_shard(self, shard_id: int | np.integer, blocking: bool = True) -> None:
        if not blocking:
            self.__dict__.setdefault("ahead", []).append(int(shard_id))
        super().prepare_shard(shard_id, blocking)


def test_a_shard_is_brought_ahead_once_for_all_its_samples_that_are_near(remote: Path, cache: Path) -> None:
    dataset = Asked(remote=str(remote), local=str(cache), batch_size=4, predownload=NUM_SAMPLES)
    assert len(list(dataset)) == NUM_SAMPLES
    assert dataset.ahead == list(range(len(shard_names(remote))))


def test_no_more_is_brought_ahead_than_predownload_says(remote: Path, cache: Path) -> None:
    dataset = Asked(remote=str(remote), local=str(cache), batch_size=4, predownload=4, shuffle=False)
    samples = iter(dataset)
    next(samples)
    time.sleep(0.2)  # the thread looks 28 times in it
    near = {dataset._find(number)[0] for number in range(5)}
    assert set(dataset.ahead) == near and len(near) < len(shard_names(remote))
    assert len(list(samples)) == NUM_SAMPLES - 1


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


# ------------------------------------------------------------------------------------------------- caches


def test_a_shard_that_went_bad_in_the_cache_is_fetched_again(remote: Path, cache: Path) -> None:
    place = {"remote": str(remote), "local": str(cache)}
    read_epoch(build_loader(**place))
    for kind, name in zip(("flipped", "truncated", "missing"), shard_names(cache), strict=False):
        damage(cache / name, kind)
    assert sorted(read_epoch(build_loader(**place))) == list(range(NUM_SAMPLES))
    assert all((cache / name).read_bytes() == (remote / name).read_bytes() for name in shard_names(remote))


@pytest.mark.parametrize("hashes", [["xxh64"], []], ids=["with hashes", "without"])
def test_a_cache_of_data_that_were_converted_again_is_renewed(tmp_path: Path, cache: Path, hashes: list[str]) -> None:
    remote = write_set(tmp_path / "remote", hashes=hashes)
    place = {"remote": str(remote), "local": str(cache)}
    read_epoch(build_loader(**place))
    for path in remote.iterdir():
        path.unlink()
    write_set(remote, num_samples=20, tag="b", hashes=hashes)
    loader = build_loader(**place)
    assert sorted(read_epoch(loader)) == list(range(20))
    assert {loader.dataset[index]["text"] for index in range(20)} == {"b" * 1000}
    assert {path.name for path in cache.glob("*.mds")} == {path.name for path in remote.glob("*.mds")}


def test_a_cache_folder_that_cannot_be_written_is_told_at_the_start(remote: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    error = fail(remote=str(remote), local=str(tmp_path / "file" / "cache"))
    assert error.rule == "cache-not-writable"
    assert error.where == str(tmp_path / "file" / "cache")


def test_a_full_disk_is_told_and_leaves_no_part(remote: Path, cache: Path) -> None:
    read_epoch(build_loader(remote=str(remote), local=str(cache)))
    name = shard_names(cache)[3]
    (cache / name).unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # the index is smaller, a shard isn't
        error = fail(remote=str(remote), local=str(cache))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (error.shard, error.rule, error.where) == (name, "cache-full", str(cache))
    assert not list(cache.glob(f"{name}*"))


def test_two_loaders_of_one_run_may_not_share_a_cache(remote: Path, cache: Path) -> None:
    first = build_loader(remote=str(remote), local=str(cache))
    assert fail(remote=str(remote), local=str(cache)).rule == "cache-in-use"
    assert len(read_epoch(first)) == NUM_SAMPLES


def test_a_cache_limit_is_kept_and_never_touches_data_without_a_remote(remote: Path, cache: Path) -> None:
    limit = 5 * 4400
    loader = build_loader(remote=str(remote), local=str(cache), cache_limit=limit, predownload=4)
    assert sorted(read_epoch(loader)) == list(range(NUM_SAMPLES))
    assert sum(path.stat().st_size for path in cache.iterdir()) <= limit
    assert sorted(read_epoch(build_loader(local=str(remote), cache_limit=limit))) == list(range(NUM_SAMPLES))
    assert len(shard_names(remote)) == 10


def test_the_shard_that_was_read_last_is_never_the_one_that_makes_room(remote: Path, cache: Path) -> None:
    size = (remote / shard_names(remote)[0]).stat().st_size
    limit = (remote / "index.json").stat().st_size + 4 * size
    dataset = build_loader(remote=str(remote), local=str(cache), cache_limit=limit).dataset
    starts = [int(start) for start in dataset.sample_offset_per_shard]
    for number, leaves in ((0, None), (1, None), (2, None), (3, None), (0, None), (4, 1), (5, 2), (0, None), (6, 3)):
        before = {path.name for path in cache.glob("*.mds")}
        assert dataset[starts[number]]["id"] == starts[number]
        gone = {shard_names(remote)[leaves]} if leaves is not None else set()
        assert before - {path.name for path in cache.glob("*.mds")} == gone


def test_a_shard_that_changes_after_its_check_is_told(remote: Path, cache: Path) -> None:
    dataset = build_loader(remote=str(remote), local=str(cache)).dataset
    assert dataset[0]["id"] == 0
    path = cache / shard_names(remote)[0]
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(StreamError, match=r"changed: a sample of it can't be read .* as the file changed in the cache"):
        dataset[1]
    assert not path.exists()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_that_ends_too_early_is_an_error(
    num_workers: int, remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = GuardedStreamingDataset.__iter__
    monkeypatch.setattr(GuardedStreamingDataset, "__iter__", lambda dataset: itertools.islice(whole(dataset), 18))
    assert fail(num_workers=num_workers, local=str(remote)).rule == "samples-missing"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_that_a_killed_worker_left_half_way_is_not_waited_for_for_ever(
    num_workers: int, remote: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hurried:
        """A clock that goes 20 times too fast; the bound is 46 s."""

        sleep, time_ns = time.sleep, time.time_ns

        @staticmethod
        def monotonic() -> float:
            return 20 * time.monotonic()

    monkeypatch.setattr("composer_path.stream.guarded.time", Hurried)
    loader = build_loader(num_workers, remote=str(remote), local=str(cache))
    loader.dataset._shard_states[4] = np.uint8(_ShardState.PREPARING)
    with pytest.raises(StreamError, match=r"shard shard.00004.mds of .*: stalled: another process has been preparing"):
        read_epoch(loader)
    end_workers(loader)


# --------------------------------------------------------------------------------------------------- runs

RUN = """
import os, sys, time
sys.path.insert(0, {tests!r})
import torch
if os.environ.get("WORLD_SIZE", "1") != "1":
    torch.distributed.init_process_group("gloo")
from tiny_shards import build_loader
loader = build_loader({num_workers}, batch_size=2, **{place!r})
print("reading", flush=True)
for batch in loader:
    print(*batch.sample_ids, flush=True)
    time.sleep({pause})
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
print("done", flush=True)
"""


def start_run(num_workers: int, pause: float = 0.0, **place: str) -> subprocess.Popen:
    code = RUN.format(tests=str(Path(__file__).parents[1]), num_workers=num_workers, place=place, pause=pause)
    words = [sys.executable, "-c", code]
    return popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_a_run_with_a_bad_shard_ends_with_an_error_code_and_leaves_no_process(remote: Path, cache: Path) -> None:
    name = shard_names(remote)[5]
    damage(remote / name, "missing")
    run = start_run(2, remote=str(remote), local=str(cache))
    output, errors = run.communicate(timeout=90)
    assert run.returncode == 1
    assert "done" not in output
    last = errors.strip().splitlines()[-1]
    assert last.startswith("composer_path.stream.error.StreamError: shard ") and name in last and "missing" in last
    wait_until_gone(run.pid, 5)


def test_a_killed_run_leaves_neither_workers_nor_a_blocked_cache(remote: Path, cache: Path) -> None:
    place = {"remote": str(remote), "local": str(cache)}
    run = start_run(2, pause=60, **place)
    try:
        assert run.stdout is not None
        while (line := run.stdout.readline()).strip() in ("reading", ""):
            assert line, "the run ended before it had read a batch"
        # A second run finds the folder taken ...
        assert fail(**place, seconds=20).rule == "cache-in-use"
        # ... and free as soon as the first is killed, though its shared memory is still there.
        tracker = [
            pid for pid in processes_of(run.pid) if "resource_tracker" in Path(f"/proc/{pid}/cmdline").read_text()
        ]
        for pid in [*tracker, run.pid]:
            os.kill(pid, signal.SIGKILL)
        run.wait()
        wait_until_gone(run.pid, 5)
        (cache / "shard.00009.mds.123-0123abcd.part").write_bytes(b"left over")
        assert sorted(read_epoch(build_loader(**place))) == list(range(NUM_SAMPLES))
        assert not list(cache.glob("*.part"))
    finally:
        run.kill()


@pytest.mark.world_size(2)
@pytest.mark.parametrize("kind", ["missing", pytest.param("index", marks=pytest.mark.slow)])
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_both_of_two_ranks_end(kind: str, num_workers: int, remote: Path, cache: Path, tmp_path: Path) -> None:
    damage(remote / (shard_names(remote)[5] if kind == "missing" else "index.json"), "missing")
    place = {"remote": str(remote), "local": str(cache)}
    code = RUN.format(tests=str(Path(__file__).parents[1]), num_workers=num_workers, place=place, pause=0)
    (tmp_path / "run.py").write_text(code)
    launcher = [sys.executable, "-m", "composer.cli.launcher", "-n", "2", str(tmp_path / "run.py")]
    run = popen(launcher, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0
    assert "done" not in output
    assert "StreamError: " in output and ": missing: " in output
    wait_until_gone(run.pid, 10)
