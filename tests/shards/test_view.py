"""Samples of a set are found by position and by id; flat and partitioned sets, on disks and in buckets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from s3_server import KEY, serve_s3
from s3_server import SECRET as SECRET_KEY
from tiny_sets import (
    NUM_RECORDS,
    flip,
)

from composer_path.shards.check import check_shards
from composer_path.shards.columns import pack_images
from composer_path.shards.mds import ShardError
from composer_path.shards.select import Condition, select_samples
from composer_path.shards.view import ShardView


def test_every_sample_is_found_by_position_and_by_id(any_set: str, samples: list[dict[str, Any]]) -> None:
    view = ShardView(any_set)
    assert len(view) == NUM_RECORDS
    for position in (0, 7, 11, NUM_RECORDS - 1):
        for sample in (view.sample(position), view.find(samples[position]["id"])):
            assert (sample.position, sample.id) == (position, samples[position]["id"])
            assert sample.conversation.to_shard() == samples[position]["conversation"]
            assert sample.metadata == samples[position]["metadata"]
            assert pack_images(sample.images) == samples[position]["images"]
    for position in (-1, NUM_RECORDS):
        with pytest.raises(ShardError, match=f"from 0 to {NUM_RECORDS - 1}, found {position}"):
            view.sample(position)
    with pytest.raises(ShardError, match=r"no sample has this id$"):
        view.find("nobody")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must hold index.json, found none"),
        ("{", "index.json must be JSON, found a damaged file"),
        ("[]", "must list MDS shards"),
        ('{"version": 1, "shards": []}', "must list MDS shards"),
        ('{"version": 2, "shards": [{"format": "csv"}]}', "must list MDS shards with the columns id, conversation"),
    ],
)
def test_what_is_no_set_of_ours_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "index.json").write_text(content)
    with pytest.raises(ShardError, match=message):
        ShardView(tmp_path)
    with pytest.raises(ShardError, match=r"must hold index\.json"):
        ShardView(tmp_path / "nowhere")


def test_an_index_cannot_lead_out_of_its_set(flat: Path, tmp_path: Path) -> None:
    index = json.loads((flat / "index.json").read_text())
    for name in ("/etc/passwd", "../flat/shard.00000.mds", "a/../../b.mds"):
        index["shards"][0]["raw_data"]["basename"] = name
        (tmp_path / "index.json").write_text(json.dumps(index))
        with pytest.raises(ShardError, match="must list MDS shards"):
            ShardView(tmp_path)


def test_a_set_on_a_real_s3_server_is_viewed_checked_and_chosen_from(
    partitioned: Path, samples: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = tmp_path / "s3" / "bucket"
    shutil.copytree(partitioned, bucket / "set")
    with serve_s3(tmp_path / "s3") as port:
        environment = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_DEFAULT_REGION": "us-east-1"}
        for name, value in {**environment, "S3_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
            monkeypatch.setenv(name, value)
        view = ShardView("s3://bucket/set")
        assert view.sample(17).metadata == samples[17]["metadata"]
        assert check_shards(view, workers=2).problems == []
        select_samples(view, "s3://bucket/chosen", [Condition.parse("stain=H&E")], num_samples=5, workers=2)
        assert check_shards(ShardView("s3://bucket/chosen")).problems == []
        assert sorted(path.name for path in (bucket / "chosen").iterdir()) == [
            "dataset.json",
            "index.json",
            "part-00000",
        ]

        flip(next((bucket / "set" / "part-00000").glob("*.mds")), -1)
        (bucket / "set" / "stray.mds").write_bytes(b"")
        rules = {problem.rule for problem in check_shards(ShardView("s3://bucket/set"), workers=2).problems}
        assert rules == {"hash", "not-in-index"}
        with pytest.raises(ShardError, match="must be empty"):
            select_samples(view, "s3://bucket/chosen", num_samples=5)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
        with pytest.raises(ShardError, match="SignatureDoesNotMatch") as caught:
            ShardView("s3://bucket/set")
        assert "another-secret" not in str(caught.value)
