"""Where a run's files lie; what is sent to a bucket, and when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from composer_path.checkpoints.bucket import BucketFolder
from composer_path.run import place
from composer_path.run.place import SendFiles, checkpoints_of, folder_of, on_this_disk


class Store:
    """A bucket that notes what it is given, and refuses names that hold a word."""

    def __init__(self, url: str, refused: str = "") -> None:
        self.url, self.refused = url, refused
        self.names: list[str] = []

    def write_file(self, name: str, path: Path) -> None:
        if self.refused and self.refused in name:
            raise OSError(f"{self.url}: can't write it")
        self.names.append(name)


@pytest.fixture
def sender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SendFiles:
    """Of a run's folder with results, a checkpoint, a lock, and files that are being written."""
    monkeypatch.setattr(place, "Bucket", Store)
    kept: Sequence[str] = ("config.yaml", "model/config.json", "model/model.safetensors", "runs/a/events.1")
    others: Sequence[str] = (".lock", "checkpoints/ep0-ba1/manifest.json", ".x.unfinished", "model/.7.unfinished/w")
    for name in (*kept, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    return SendFiles("s3://bucket/run", tmp_path)


def test_a_runs_files_lie_in_its_folder_or_on_the_way_to_its_bucket(tmp_path: Path) -> None:
    assert folder_of(str(tmp_path), "a/run") == tmp_path / "a" / "run"
    assert str(checkpoints_of(str(tmp_path), "run")) == str(tmp_path / "run" / "checkpoints")
    here = {folder_of(root, "run") for root in ("s3://one", "s3://other")}
    assert len(here) == 2 and all(path.name == "run" and not path.exists() for path in here)
    there = checkpoints_of("s3://bucket/runs/", "run")
    assert isinstance(there, BucketFolder) and str(there) == "s3://bucket/runs/run/checkpoints"
    assert on_this_disk("weights/a.pt") == Path("weights/a.pt") and on_this_disk("s3://b/c/a.pt").name == "a.pt"


def test_what_is_new_is_sent_once_and_a_models_configuration_after_its_weights(sender: Any) -> None:
    sender.send()
    assert sender.place.names == ["config.yaml", "model/model.safetensors", "runs/a/events.1", "model/config.json"]
    sender.send()
    assert len(sender.place.names) == 4
    (sender.folder / "config.yaml").write_text("22")
    sender.send()
    assert sender.place.names[4:] == ["config.yaml"]


def test_what_cant_be_sent_is_an_error_that_says_where_it_lies(sender: Any, tmp_path: Path) -> None:
    sender.place.refused = "model"
    with pytest.raises(OSError, match=rf"s3://bucket/run: can't write it \(it lies in {tmp_path}\)"):
        sender.send()


def test_what_cant_be_sent_after_the_end_is_a_warning(sender: Any, caplog: pytest.LogCaptureFixture) -> None:
    sender.place.refused = "runs"
    sender.post_close()
    assert "what was written last wasn't sent" in caplog.text


def test_it_is_sent_with_each_checkpoint_and_at_the_end() -> None:
    events = {"batch_checkpoint", "epoch_checkpoint", "fit_end", "post_close"}
    assert events == {name for name in vars(SendFiles) if not name.startswith("_") and name != "send"} & set(
        dir(place.Callback)
    )
