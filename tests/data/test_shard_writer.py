"""Shard files: an index appears beside a complete data set only, on a disk and in an object store."""

from __future__ import annotations

import errno
import io
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from composer_path.data import shards
from composer_path.data.rejections import ConvertError
from composer_path.data.shards import ConvertSummary, convert

REPO = Path(__file__).resolve().parents[2]


def turns() -> list[dict[str, str]]:
    return [{"from": "human", "value": "Which stain?"}, {"from": "gpt", "value": "PAS."}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with one image; tests write their data.json into it."""
    images = tmp_path / "input" / "imgs"
    images.mkdir(parents=True)
    file = io.BytesIO()
    Image.new("RGB", (32, 24), (200, 120, 180)).save(file, "PNG")
    (images / "a.png").write_bytes(file.getvalue())
    return tmp_path / "input"


def write(source: Path, records: object) -> Path:
    path = source / "data.json"
    path.write_text(json.dumps(records))
    return path


def run(source: Path, records: object, out: Path, **options: Any) -> ConvertSummary:
    return convert(write(source, records), source / "imgs", out, **options)


def read_back(folder: Path) -> list[dict[str, Any]]:
    from streaming import StreamingDataset

    return list(StreamingDataset(local=str(folder), batch_size=1, shuffle=False, validate_hash="xxh64"))


def test_a_record_larger_than_a_shard_gets_its_own(source: Path, tmp_path: Path) -> None:
    records = [{"image": "a.png", "conversations": turns()} for _ in range(3)]
    summary = run(source, records, tmp_path / "out", size_limit=100)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [shard["samples"] for shard in index["shards"]] == [1, 1, 1]
    assert summary.shards == len(read_back(tmp_path / "out")) == 3


def test_an_error_while_writing_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail_late(data: bytes, max_pixels: int) -> bytes:
        calls.append(1)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        return data

    monkeypatch.setattr(shards, "sanitize_image", fail_late)
    records = [{"image": "a.png", "conversations": turns()} for _ in range(10)]
    with pytest.raises(OSError, match="No space left"):
        run(source, records, tmp_path / "out", size_limit=300)
    assert [path.name for path in tmp_path.iterdir()] == ["input"]


def test_a_mount_point_gets_the_files_one_by_one(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(source: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr("composer_path.data.shard_writer.os.replace", busy)
    run(source, [{"image": "a.png", "conversations": turns()}], tmp_path / "out", ids="keep")
    assert len(read_back(tmp_path / "out")) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input", "out"]


def test_a_killed_conversion_leaves_no_index_and_can_be_repeated(source: Path, tmp_path: Path) -> None:
    data = write(source, [{"image": "a.png", "conversations": turns()} for _ in range(200)])
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(REPO)!r})
from composer_path.data import shards
from composer_path.data.shard_writer import ShardWriter
write = ShardWriter.write
def write_and_die(self, sample):
    write(self, sample)
    if len(self.shards) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
ShardWriter.write = write_and_die
shards.convert({str(data)!r}, {str(source / "imgs")!r}, {str(tmp_path / "out")!r}, size_limit=1000)
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert killed.returncode == -9
    assert list(tmp_path.rglob("*.mds"))
    assert not list(tmp_path.rglob("index.json"))
    assert not (tmp_path / "out").exists()
    assert convert(data, source / "imgs", tmp_path / "out").records == 200


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An object store `fake://bucket`, which is a folder; uploads of names in its file `.refuse` fail."""
    from streaming.base.storage import upload

    folder = tmp_path / "bucket"
    folder.mkdir()

    class FakeUploader(upload.CloudUploader):
        def upload_file(self, filename: str) -> None:
            if (folder / ".refuse").exists() and filename in (folder / ".refuse").read_text():
                raise PermissionError("403")
            shutil.copy(Path(self.local, filename), folder / filename)
            self.clear_local(str(Path(self.local, filename)))

        def list_objects(self, prefix: str | None = None) -> list[str]:
            return [path.name for path in folder.iterdir() if path.name != ".refuse"]

    monkeypatch.setitem(upload.UPLOADERS, "fake", "FakeUploader")
    monkeypatch.setattr(upload, "FakeUploader", FakeUploader, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return folder


def test_a_uri_gets_the_same_files_as_a_folder(source: Path, tmp_path: Path, bucket: Path) -> None:
    data = write(source, [{"id": i, "image": "a.png", "conversations": turns()} for i in range(5)])
    convert(data, source / "imgs", "fake://bucket", size_limit=500)
    convert(data, source / "imgs", tmp_path / "out", size_limit=500)
    names = sorted(path.name for path in bucket.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert all((bucket / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in names)
    assert not list((tmp_path / "temporary").iterdir())
    with pytest.raises(ConvertError, match="must be empty"):
        convert(data, source / "imgs", "fake://bucket")


@pytest.mark.parametrize("refused", ["shard.00001.mds", "shard.00004.mds", "dataset.json", "index.json"])
def test_a_refused_upload_leaves_no_index(
    source: Path, tmp_path: Path, bucket: Path, refused: str, caplog: pytest.LogCaptureFixture
) -> None:
    (bucket / ".refuse").write_text(refused)
    caplog.set_level(logging.CRITICAL)
    records = [{"image": "a.png", "conversations": turns()} for _ in range(5)]
    with pytest.raises(ConvertError, match="every shard must be uploaded"):
        convert(write(source, records), source / "imgs", "fake://bucket", size_limit=300)
    assert not (bucket / "index.json").exists()
    assert not list((tmp_path / "temporary").iterdir())


def test_a_place_that_cannot_be_written_is_named(source: Path) -> None:
    with pytest.raises(ConvertError, match="--out nowhere://x: must be a writable place"):
        convert(write(source, [{"conversations": turns()}]), source / "imgs", "nowhere://x")
