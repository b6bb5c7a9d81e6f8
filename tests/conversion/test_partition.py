"""A partition: what of an earlier run is taken over, and what is seen of images while it is converted."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from composer_path.conversion.convert import convert
from composer_path.conversion.rejected_file import ConvertError
from composer_path.conversion.summary import ConvertSummary
from composer_path.shards.view import ShardView

COUNT = 9  # records, three in a partition


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Records of an image each, one of them of two; tests change images between two runs."""
    images = tmp_path / "input" / "imgs"
    images.mkdir(parents=True)
    for number in range(COUNT):
        write_image(images / f"{number}.jpg", seed=number)
    turns = [{"from": "human", "value": "Which stain?"}, {"from": "gpt", "value": "PAS."}]
    records: list[dict[str, Any]] = [
        {"id": number, "image": f"{number}.jpg", "conversations": turns} for number in range(COUNT)
    ]
    (tmp_path / "input" / "data.json").write_text(json.dumps(records))
    return tmp_path / "input"


def write_image(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    path.write_bytes(file.getvalue())


def run(source: Path, out: Path, **options: Any) -> ConvertSummary:
    return convert(source / "data.json", source / "imgs", out, partition_size=3, ids="keep", **options)


def stored(out: Path) -> list[bytes]:
    view = ShardView(out)
    return [image for number in range(len(view.shards)) for sample in view.samples(number) for image in sample.images]


def unpublished(out: Path) -> None:
    """As a run leaves it that was killed before its last step."""
    (out / "index.json").unlink()


@pytest.mark.parametrize("complete", [False, True], ids=["killed", "complete"])
def test_a_partition_whose_image_changed_since_is_made_again(source: Path, tmp_path: Path, complete: bool) -> None:
    run(source, tmp_path / "out")
    if not complete:
        unpublished(tmp_path / "out")
    write_image(source / "imgs" / "4.jpg", seed=99)
    assert run(source, tmp_path / "out", resume=True).resumed == 2
    run(source, tmp_path / "fresh")
    assert stored(tmp_path / "out") == stored(tmp_path / "fresh")
    assert (tmp_path / "out" / "index.json").read_bytes() == (tmp_path / "fresh" / "index.json").read_bytes()


def test_a_partition_whose_images_stayed_is_taken_over(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    unpublished(tmp_path / "out")
    assert run(source, tmp_path / "out", resume=True).resumed == 3


def test_an_image_of_the_same_size_that_was_written_later_is_noticed(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    path = source / "imgs" / "0.jpg"
    data = path.read_bytes()
    path.write_bytes(data[:-10] + bytes(byte ^ 1 for byte in data[-10:-2]) + data[-2:])
    assert path.stat().st_size == len(data)
    os.utime(path, ns=(1, 10**18))
    assert run(source, tmp_path / "out", resume=True).resumed == 2


def test_an_image_that_was_missing_and_came_is_taken_in(source: Path, tmp_path: Path) -> None:
    (source / "imgs" / "7.jpg").rename(source / "7.jpg")
    summary = run(source, tmp_path / "out", on_error="skip")
    assert (summary.records, summary.rejected_by_rule) == (COUNT - 1, {"missing-file": 1})
    (source / "7.jpg").rename(source / "imgs" / "7.jpg")
    summary = run(source, tmp_path / "out", on_error="skip", resume=True)
    assert (summary.records, summary.rejected, summary.resumed) == (COUNT, 0, 2)


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("option", ["resume", "overwrite"])
def test_a_conversion_that_fails_leaves_the_published_set_as_it_was(
    source: Path, tmp_path: Path, option: str, gone: bool
) -> None:
    run(source, tmp_path / "out")
    before = files_of(tmp_path / "out")
    write_image(source / "imgs" / "0.jpg", seed=99)  # its partition is made anew, beside the set
    if gone:
        (source / "imgs" / "8.jpg").unlink()
    else:
        (source / "imgs" / "8.jpg").write_bytes(b"no image")
    with pytest.raises(ConvertError, match="missing-file 1" if gone else "unreadable-image 1"):
        run(source, tmp_path / "out", **{option: True})
    assert files_of(tmp_path / "out") == before


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("options", [{}, {"resized": {"image_size": 28, "fit": "crop", "pad_color": None}}])
def test_an_image_whose_data_end_early_is_found_by_a_full_check(
    source: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    path = source / "imgs" / "3.jpg"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3].rstrip(b"\xff") + b"\xff\xd9")
    with pytest.raises(ConvertError, match=r"record 3: image 1 of 1: .*ends before its pixels do"):
        run(source, tmp_path / "out", **options)
    assert run(source, tmp_path / "header", check="header", **options).records == COUNT  # it doesn't look so far
