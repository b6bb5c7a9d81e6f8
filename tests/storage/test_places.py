"""Buckets through a real S3 server: the same rules for every request, repeated where that may help."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from s3_server import KEY, SECRET, Proxy, Spoil, serve_s3

from composer_path.storage import places
from composer_path.storage.errors import Fault, StorageError
from composer_path.storage.google import GoogleStore, google_store
from composer_path.storage.places import Bucket, Folder, check_readable, open_file
from composer_path.storage.s3 import S3Store
from composer_path.storage.transfer import Limits

DATA = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    root = tmp_path_factory.mktemp("s3")
    (root / "bucket").mkdir()
    with serve_s3(root, written=True) as port:
        yield port


@pytest.fixture
def proxy(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy(server)
    proxy.start()
    environment = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    environment |= {"S3_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}", "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(places, "_PAUSES", (0.01, 0.01))
    yield proxy
    proxy.stop()


def test_a_place_does_what_it_says(proxy: Proxy, tmp_path: Path) -> None:
    for place in (Bucket("s3://bucket/some/folder/"), Bucket("memory://bucket/folder"), Folder(tmp_path)):
        place.write("a/b.bin", [DATA[:9], DATA[9:]])
        place.write("c", [b"c"])
        assert place.files() == {"a/b.bin": len(DATA), "c": 1}
        assert place.read("a/b.bin") == DATA
        assert place.digest("a/b.bin")[0] == len(DATA)
        if isinstance(place, Bucket):
            assert pickle.loads(pickle.dumps(place)).read("a/b.bin", 100, 300) == DATA[100:300]
            assert place.size("a/b.bin") == len(DATA)
            with place.open("a/b.bin") as file:
                assert file.read(10) == DATA[:10]
                assert file.seek(-5, 2) == len(DATA) - 5
                assert file.read() == DATA[-5:]
            with open_file(f"{place.url}/a/b.bin") as file:
                assert file.read() == DATA
        place.fetch("a/b.bin", tmp_path / "beside" / "part", Limits(5.0, time.monotonic() + 20))
        assert (tmp_path / "beside" / "part").read_bytes() == DATA
        (tmp_path / "beside" / "part").unlink()
        for missing in (lambda place: place.read("no"), lambda place: place.digest("no")):
            with pytest.raises(FileNotFoundError):
                missing(place)
        with pytest.raises(Fault, match="missing"):
            place.fetch("no", tmp_path / "beside" / "part", Limits(5.0, time.monotonic() + 20))
        (tmp_path / "beside" / "part").unlink()
        place.delete(["a/b.bin", "c", "no"])
        assert place.files() == {}


@pytest.mark.parametrize("how", ["status:503", "reset", "cut:9000"])
def test_a_request_is_repeated_while_that_may_help(how: str, proxy: Proxy) -> None:
    place = Bucket("s3://bucket/repeated")
    proxy.spoils = [Spoil("PUT .*", how, 2)] if not how.startswith("cut") else []
    place.write("object", [DATA])
    proxy.spoils = [Spoil("GET .*object", how, 2)]
    assert place.read("object") == DATA
    assert all(spoil.times == 0 for spoil in proxy.spoils)
    proxy.spoils = [Spoil("GET .*object", how)]
    with pytest.raises(StorageError, match="s3://bucket/repeated: can't read it, found "):
        place.read("object")


def test_a_refused_request_is_not_repeated(proxy: Proxy) -> None:
    proxy.spoils = [Spoil("GET .*object", "status:403")]
    with pytest.raises(StorageError, match="found answer 403 AccessDenied; check address and rights"):
        Bucket("s3://bucket/refused").read("object")
    assert len(proxy.requests) == 1


@pytest.mark.parametrize("payers", ["", "other, bucket"])
def test_who_pays_is_said_in_every_request(
    payers: str, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOSAICML_STREAMING_AWS_REQUESTER_PAYS", payers)
    place = Bucket("s3://bucket/paid")
    place.write("object", [DATA])
    assert place.files() == {"object": len(DATA)}
    assert place.size("object") == len(place.read("object"))
    place.fetch("object", tmp_path / "part", Limits(5.0, time.monotonic() + 20))
    place.delete(["object"])
    kinds = {line.split()[0] for line in proxy.requests}
    assert kinds == {"PUT", "GET", "HEAD", "DELETE"} and len(proxy.heads) >= 6
    assert all((b"x-amz-request-payer: requester" in head) == bool(payers) for head in proxy.heads)


def test_google_is_an_s3_store_where_there_are_keys_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCS_KEY", "some-key")
    assert isinstance(google_store("gs://bucket/set"), GoogleStore)
    monkeypatch.setenv("GCS_SECRET", "some-secret")
    assert isinstance(google_store("gcs://bucket/set"), S3Store)


@pytest.mark.parametrize("url", ["/data/set", "s3://b/c", "gs://b/c", "gcs://b/c", "memory://b/c"])
def test_what_can_be_read_passes(url: str) -> None:
    check_readable(url)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://host/set", "http://, which isn't known"),
        ("https://me:word@host/set", "https://, which isn't known"),
        ("s3a://bucket/set", "s3a://, which isn't known"),
        ("nowhere://set", "nowhere://, which isn't known"),
        ("lacking://set", "lacking://, which asks for a package that isn't installed .*install lacking"),
    ],
)
def test_an_address_that_nothing_can_read_is_refused_by_name(url: str, why: str) -> None:
    fsspec.register_implementation("lacking", "lacking_package.System", errtxt="install lacking", clobber=True)
    rule = "must be a folder, s3://, gs://, or, with its package, what fsspec knows"
    for read in (check_readable, Bucket):
        with pytest.raises(StorageError, match=f"{rule} .*; found {why}.*; copy the files to one of these") as caught:
            read(url)
        assert "word" not in str(caught.value)
