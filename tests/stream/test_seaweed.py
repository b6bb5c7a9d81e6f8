"""A second S3 server, a distributed store: the same round trip and the heads of the failure table."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_server import KEY, SECRET, Proxy, Spoil
from seaweed_server import serve_seaweed
from tiny_shards import NUM_SAMPLES, SECONDS, build_loader, end_workers, read_epoch, upload, write_set

from composer_path.conversion.convert import convert
from composer_path.conversion.rejected_file import ConvertError
from composer_path.shards.check import check_shards
from composer_path.shards.view import ShardView
from composer_path.storage.places import Bucket
from composer_path.storage.s3 import S3Store
from composer_path.stream.error import StreamError

pytestmark = pytest.mark.slow

REPO = Path(__file__).resolve().parents[2]
BAD = "shard.00005.mds"
OPTIONS: dict[str, Any] = {"partition_size": 4, "size_limit": "50kb"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with serve_seaweed(tmp_path_factory.mktemp("seaweed")) as port:
        yield port


@pytest.fixture
def proxy(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy(server)
    proxy.start()
    environment = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    environment |= {"S3_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}", "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    yield proxy
    proxy.stop()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_bucket_gets_what_a_folder_gets_also_after_an_end_half_way(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = json.loads((REPO / "test_data" / "data.json").read_text(encoding="utf-8"))[:24]
    (tmp_path / "data.json").write_text(json.dumps(records), encoding="utf-8")
    source = (tmp_path / "data.json", REPO / "test_data" / "imgs")
    out, upload_object = "s3://bucket/round", S3Store.write

    def end(self: S3Store, name: str, data: bytes) -> None:
        if "part-00003" in name:
            raise KeyboardInterrupt
        upload_object(self, name, data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(S3Store, "write", end)
        convert(*source, out, key=tmp_path / "key", **OPTIONS)
    assert "index.json" not in Bucket(out).files()
    assert convert(*source, out, key=tmp_path / "key", resume=True, **OPTIONS).resumed >= 1
    convert(*source, tmp_path / "out", key=tmp_path / "key", **OPTIONS)
    place = Bucket(out)
    assert {name: place.read(name) for name in place.files()} == contents(tmp_path / "out")
    with pytest.raises(ConvertError, match="must be empty, found files"):
        convert(*source, out, key=tmp_path / "key", **OPTIONS)
    convert(*source, out, key=tmp_path / "key", overwrite=True)
    assert len(place.files()) == 5  # no orphan
    assert not check_shards(ShardView(out)).problems


@pytest.fixture
def stored_set(proxy: Proxy, tmp_path: Path) -> str:
    url = f"s3://bucket/{tmp_path.name}"
    upload(write_set(tmp_path / "plain"), url)
    return url


def read(url: str, cache: Path, num_workers: int, **keywords: Any) -> list[int]:
    loader = build_loader(num_workers, remote=url, local=str(cache), **keywords)
    try:
        return sorted(read_epoch(loader))
    finally:
        end_workers(loader)


SURVIVED = {
    "nothing wrong": [],
    "503 twice": [Spoil(BAD, "status:503", 2)],
    "reset twice": [Spoil(BAD, "reset", 2)],
    "cut bodies": [Spoil(BAD, "cut:1500", 2)],
}


@pytest.mark.parametrize("name", SURVIVED)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_fault_that_passes_costs_no_sample(
    name: str, num_workers: int, proxy: Proxy, stored_set: str, tmp_path: Path
) -> None:
    proxy.spoils = [Spoil(f"GET .*{spoil.path}", spoil.how, spoil.times) for spoil in SURVIVED[name]]
    assert read(stored_set, tmp_path / "cache", num_workers, download_timeout=1.0) == list(range(NUM_SAMPLES))
    assert all(spoil.times == 0 for spoil in proxy.spoils)


@pytest.mark.parametrize("kind", ["deleted", "overwritten", "403", "black hole", "wrong secret"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_fault_that_stays_ends_in_one_named_error(
    kind: str, num_workers: int, proxy: Proxy, stored_set: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, rule, shard = Bucket(stored_set), {"deleted": "missing", "overwritten": "size"}.get(kind, "forbidden"), BAD
    if kind == "deleted":
        place.delete([BAD])
    elif kind == "overwritten":
        place.write(BAD, [b"something else"])
    elif kind == "wrong secret":
        shard = "index.json"
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    else:
        rule = "unreachable" if kind == "black hole" else rule
        proxy.spoils = [Spoil(f"GET .*{BAD}", "hang" if kind == "black hole" else "status:403")]
    start = time.monotonic()
    with pytest.raises(StreamError) as caught:
        read(stored_set, tmp_path / "cache", num_workers, download_timeout=2.0)
    assert time.monotonic() - start < SECONDS + 25  # with workers' start, on a busy machine
    assert (caught.value.shard, caught.value.rule, caught.value.where) == (shard, rule, stored_set)
    assert SECRET not in str(caught.value) and "another-secret" not in str(caught.value)
    assert not list((tmp_path / "cache").glob(f"{shard}*"))
