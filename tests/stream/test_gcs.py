"""A bucket of Google's: converting to it and reading from it, with a server on loopback that speaks its JSON API."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gcs_server import serve_gcs
from s3_server import Proxy, Spoil
from session_processes import wait_until_gone
from tiny_shards import NUM_SAMPLES, SECONDS, build_loader, end_workers, read_epoch, upload, write_set

from composer_path.cli import main
from composer_path.conversion.convert import convert
from composer_path.conversion.rejections import ConvertError
from composer_path.storage.errors import StorageError
from composer_path.storage.places import Bucket
from composer_path.stream.error import StreamError

REPO = Path(__file__).resolve().parents[2]
REMOTE = "gs://bucket/set"
BAD = "shard.00005.mds"
NUM_RECORDS = 24
OPTIONS: dict[str, Any] = {"partition_size": 4, "size_limit": "50kb"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    root = tmp_path_factory.mktemp("gcs")
    (root / "bucket").mkdir()
    with serve_gcs(root) as port:
        yield port


@pytest.fixture
def proxy(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy(server)
    proxy.start()
    # Neither this machine's credentials nor a search for a cloud machine's.
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{proxy.port}")
    yield proxy
    proxy.stop()


@pytest.fixture
def stored_set(proxy: Proxy, tmp_path: Path) -> str:
    url = f"gs://bucket/{tmp_path.name}"
    upload(write_set(tmp_path / "plain"), url)
    return url


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    every = json.loads((REPO / "test_data" / "data.json").read_text(encoding="utf-8"))
    path = tmp_path_factory.mktemp("records") / "data.json"
    path.write_text(json.dumps(every[:NUM_RECORDS]), encoding="utf-8")
    return path


def contents(place: Bucket) -> dict[str, bytes]:
    return {name: place.read(name) for name in place.files()}


def folder_contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_convert(records: Path, out: str, key: Path, *more: str) -> list[str]:
    words = [sys.executable, str(REPO / "data_prep" / "convert.py"), "--data", str(records), "--out", out]
    words += ["--images", str(REPO / "test_data" / "imgs"), "--key", str(key)]
    return [*words, "--partition-size", "4", "--size-limit", "50kb", "--workers", "2", *more]


def view(url: str, *words: str) -> int:
    """The verb `shards`; its exit code."""
    return main(["shards", url, *words])


def test_a_bucket_gets_what_a_folder_gets_and_can_be_looked_into(
    proxy: Proxy, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, images = "gs://bucket/round", REPO / "test_data" / "imgs"
    convert(records, images, out, key=tmp_path / "key", **OPTIONS)
    convert(records, images, tmp_path / "out", key=tmp_path / "key", **OPTIONS)
    place = Bucket(out)
    assert contents(place) == folder_contents(tmp_path / "out")
    assert view(out, "summary") == 0
    assert f"{NUM_RECORDS}" in capsys.readouterr().out
    assert view(out, "verify") == 0
    with pytest.raises(ConvertError, match="must be empty, found files"):
        convert(records, images, out, key=tmp_path / "key", **OPTIONS)
    before = len(place.files())
    convert(records, images, out, key=tmp_path / "key", overwrite=True)
    assert len(place.files()) < before
    name = "part-00000/shard.00000.mds"
    data = place.read(name)
    place.write(name, [data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]])
    assert view(out, "verify") == 1
    assert name in "".join(capsys.readouterr())


def test_a_killed_conversion_is_resumed_to_the_same_bytes(proxy: Proxy, records: Path, tmp_path: Path) -> None:
    place = Bucket("gs://bucket/killed")
    line = run_convert(records, str(place), tmp_path / "key")
    running = subprocess.Popen(line, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while not any(name.endswith("done.json") for name in place.files()) and time.monotonic() < end:
            time.sleep(0.02)
        running.send_signal(signal.SIGKILL)
        running.wait()
        wait_until_gone(running.pid, 20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    found = place.files()
    assert any(name.endswith("done.json") for name in found)
    assert "index.json" not in found
    subprocess.run([*line, "--resume"], check=True, capture_output=True, timeout=60)
    convert(records, REPO / "test_data" / "imgs", tmp_path / "out", key=tmp_path / "key", **OPTIONS)
    assert contents(place) == folder_contents(tmp_path / "out")


def test_a_refused_upload_leaves_no_index(proxy: Proxy, records: Path, tmp_path: Path) -> None:
    proxy.spoils = [Spoil("POST .*upload", "status:403")]
    with pytest.raises((StorageError, ConvertError), match="403"):
        convert(records, REPO / "test_data" / "imgs", "gs://bucket/refused", key=tmp_path / "key", **OPTIONS)
    assert Bucket("gs://bucket/refused").files() == {}


def test_both_schemes_of_google_are_one_for_conversion_and_for_training(stored_set: str, tmp_path: Path) -> None:
    other = stored_set.replace("gs://", "gcs://")
    assert contents(Bucket(other)) == contents(Bucket(stored_set))
    assert read(other, tmp_path / "cache") == list(range(NUM_SAMPLES))


def read(url: str, cache: Path, num_workers: int = 0, **keywords: Any) -> list[int]:
    loader = build_loader(num_workers, remote=url, local=str(cache), **keywords)
    try:
        return sorted(read_epoch(loader))
    finally:
        end_workers(loader)


SURVIVED = {
    "nothing wrong": [],
    "503 twice": [Spoil(BAD, "status:503", 2)],
    "429 on the index": [Spoil("index.json", "status:429", 1)],
    "reset twice": [Spoil(BAD, "reset", 2)],
    "cut bodies": [Spoil(BAD, "cut:1500", 2)],
    "a byte changed on its way": [Spoil(BAD, "flip:2000", 1)],
}


@pytest.mark.parametrize("name", SURVIVED)
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_fault_that_passes_costs_no_sample(
    name: str, num_workers: int, proxy: Proxy, stored_set: str, tmp_path: Path
) -> None:
    proxy.spoils = [Spoil(f"GET .*{spoil.path}", spoil.how, spoil.times) for spoil in SURVIVED[name]]
    assert read(stored_set, tmp_path / "cache", num_workers, download_timeout=1.0) == list(range(NUM_SAMPLES))
    assert all(spoil.times == 0 for spoil in proxy.spoils)
    assert not list((tmp_path / "cache").glob("*.part"))


ENDS = {
    "403": (Spoil(BAD, "status:403"), "forbidden"),
    "404": (Spoil(BAD, "status:404"), "missing"),
    "400": (Spoil(BAD, "status:400"), "refused"),
    "always a changed byte": (Spoil(BAD, "flip:2000"), "hash"),
    "403 on the index": (Spoil("index.json", "status:403"), "forbidden"),
    "endless 503": (Spoil(BAD, "status:503"), "unreachable"),
    "black hole": (Spoil(BAD, "hang"), "unreachable"),
    "nothing but cut bodies": (Spoil(BAD, "cut:0"), "cut"),
    "too slow": (Spoil(BAD, "slow:300"), "too-slow"),
}
LONG = ("endless 503", "black hole", "nothing but cut bodies", "too slow")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in ENDS])
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_fault_that_stays_ends_in_one_named_error(
    name: str, num_workers: int, proxy: Proxy, stored_set: str, tmp_path: Path
) -> None:
    spoil, rule = ENDS[name]
    proxy.spoils = [Spoil(f"GET .*{spoil.path}", spoil.how)]
    start = time.monotonic()
    with pytest.raises(StreamError) as caught:
        read(stored_set, tmp_path / "cache", num_workers, download_timeout=2.0)
    assert time.monotonic() - start < SECONDS + 25  # with workers' start, on a busy machine
    error = caught.value
    assert (error.shard, error.rule, error.where) == ("index.json" if "index" in name else BAD, rule, stored_set)
    assert error.fix
    assert len(str(error).splitlines()) == 1
    assert not list((tmp_path / "cache").glob(f"{error.shard}*"))
