"""The failure table, against a real S3 server: every fault is survived, or ends in one named error within seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_server import KEY, SECRET, Proxy, Spoil, serve_s3
from tiny_shards import NUM_SAMPLES, SECONDS, build_loader, end_workers, read_epoch, shard_names, write_set

from composer_path.storage.errors import Fault, StorageError
from composer_path.storage.places import Bucket
from composer_path.storage.transfer import Limits
from composer_path.stream.error import StreamError
from composer_path.stream.guarded_stream import cache_folder

REMOTE = "s3://bucket/set"
BAD = "shard.00005.mds"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """The folder of the set's objects, and the server's port."""
    root = tmp_path_factory.mktemp("s3")
    folder = write_set(root / "bucket" / "set")
    assert BAD in shard_names(folder)
    with serve_s3(root) as port:
        yield folder, port


@pytest.fixture
def proxy(bucket: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy(bucket[1])
    proxy.start()
    environment = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    environment |= {"S3_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}", "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    yield proxy
    proxy.stop()


def read(cache: Path, num_workers: int = 0, **keywords: Any) -> list[int]:
    loader = build_loader(num_workers, remote=REMOTE, local=str(cache), **keywords)
    try:
        return sorted(read_epoch(loader))
    finally:
        end_workers(loader)


SURVIVED = {
    "503 twice": [Spoil(BAD, "status:503", 2)],
    "500 on the index": [Spoil("index.json", "status:500", 1)],
    "reset twice": [Spoil(BAD, "reset", 2)],
    "index cut once": [Spoil("index.json", "cut:100", 1)],
    "cut bodies": [Spoil(BAD, "cut:1500", 2)],
    "a byte changed on its way": [Spoil(BAD, "flip:2000", 1)],
    "slow link": [Spoil(BAD, "slow:4000", 1)],
    "one request hangs": [Spoil(BAD, "hang", 1)],
}


@pytest.mark.parametrize("name", SURVIVED)
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_fault_that_passes_costs_no_sample(name: str, num_workers: int, proxy: Proxy, tmp_path: Path) -> None:
    proxy.spoils = [Spoil(spoil.path, spoil.how, spoil.times) for spoil in SURVIVED[name]]
    assert read(tmp_path, num_workers, download_timeout=1.0) == list(range(NUM_SAMPLES))
    assert all(spoil.times == 0 for spoil in proxy.spoils)
    assert not list(tmp_path.glob("*.part"))


def test_a_cut_transfer_goes_on_where_it_was_cut(proxy: Proxy, bucket: tuple[Path, int], tmp_path: Path) -> None:
    """This server sends the rest of an object with the status 200 of a whole one."""
    proxy.spoils, arrived = [Spoil(BAD, "cut:1000", 3)], []
    place, part = Bucket(REMOTE), tmp_path / "part"
    for _ in range(3):
        with pytest.raises(Fault):
            place.fetch(BAD, part, Limits(stall=5.0, deadline=time.monotonic() + 20))
        arrived.append(part.stat().st_size)
    assert arrived == [1000, 2000, 3000]
    place.fetch(BAD, part, Limits(stall=5.0, deadline=time.monotonic() + 20))
    assert part.read_bytes() == (bucket[0] / BAD).read_bytes()


def test_an_address_stands_where_a_folder_belongs_and_gets_a_cache_of_its_own(
    proxy: Proxy, bucket: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPOSER_PATH_CACHE", str(tmp_path))
    for place in ({"local": REMOTE}, {"local": "s3://bucket/", "split": "set"}):
        loader = build_loader(0, **place)
        assert sorted(read_epoch(loader)) == list(range(NUM_SAMPLES))
        stream = loader.dataset.streams[0]
        assert stream.where == REMOTE
        assert stream.folder.parent in (tmp_path / "shards", cache_folder("s3://bucket"))
        assert shard_names(stream.folder) == shard_names(bucket[0])
    assert cache_folder("gcs://bucket/set/") == cache_folder("gs://bucket/set") != cache_folder("gs://bucket/other")
    with pytest.raises(
        ValueError, match="local: must be a folder where remote is given, found s3://bucket/set; name a"
    ):
        build_loader(0, local=REMOTE, remote="s3://bucket/other")
    with pytest.raises(StorageError, match="s3a://bucket/set: must be a folder, s3://"):
        build_loader(0, local="s3a://bucket/set")


# name: (spoils, rule, seconds)
ENDS = {
    "403": (Spoil(BAD, "status:403"), "forbidden", 4),
    "404": (Spoil(BAD, "status:404"), "missing", 4),
    "400": (Spoil(BAD, "status:400"), "refused", 4),
    "endless 503": (Spoil(BAD, "status:503"), "unreachable", SECONDS + 2),
    "endless resets": (Spoil(BAD, "reset"), "unreachable", SECONDS + 2),
    "black hole": (Spoil(BAD, "hang"), "unreachable", SECONDS + 2),
    "nothing but cut bodies": (Spoil(BAD, "cut:0"), "cut", SECONDS + 2),
    "always a changed byte": (Spoil(BAD, "flip:2000"), "hash", 5),
    "too slow": (Spoil(BAD, "slow:300"), "too-slow", SECONDS + 2),
    "403 on the index": (Spoil("index.json", "status:403"), "forbidden", 4),
    "404 on the index": (Spoil("index.json", "status:404"), "missing", 4),
    "400 on the index": (Spoil("index.json", "status:400"), "refused", 4),
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_fault_that_stays_ends_in_one_named_error(name: str, num_workers: int, proxy: Proxy, tmp_path: Path) -> None:
    spoil, rule, seconds = ENDS[name]
    proxy.spoils = [Spoil(spoil.path, spoil.how)]
    start = time.monotonic()
    with pytest.raises(StreamError) as caught:
        read(tmp_path, num_workers, download_timeout=2.0)
    # Above the bound: building a client, starting and ending workers, on a busy machine.
    assert time.monotonic() - start < seconds + 25
    error = caught.value
    assert error.shard == ("index.json" if "index" in name else BAD)
    assert error.rule == rule
    assert error.where == REMOTE
    assert error.fix
    assert not list(tmp_path.glob(f"{error.shard}*"))
    assert SECRET not in str(error) and KEY not in str(error)
    assert len([line for line in proxy.requests if error.shard in line]) < 20


def test_a_wrong_secret_is_told_at_the_start(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    with pytest.raises(StreamError, match=r"index[.]json of s3://bucket/set: forbidden: answer 403") as caught:
        read(tmp_path)
    assert "another-secret" not in str(caught.value)


def test_an_endpoint_that_is_down_is_told_at_the_start(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StreamError, match="unreachable: EndpointConnectionError"):
        read(tmp_path)


def test_a_hash_that_the_index_lacks_is_told_at_the_start(proxy: Proxy, tmp_path: Path) -> None:
    with pytest.raises(StreamError, match="no-such-hash: validate_hash is sha256, the index has xxh64"):
        read(tmp_path, validate_hash="sha256")
    assert not [line for line in proxy.requests if ".mds" in line]


def test_a_public_bucket_is_read_without_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    write_set(tmp_path / "s3" / "bucket" / "set")
    with serve_s3(tmp_path / "s3", public=True) as port:
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        assert read(tmp_path / "cache") == list(range(NUM_SAMPLES))
        assert len(Bucket(REMOTE).files()) == 11
