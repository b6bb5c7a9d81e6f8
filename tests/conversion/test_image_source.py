"""Images that records name, above all regions of slides: from a disk or a bucket into shards."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from stored_images import load_stored_image
from tiny_slide import tiny_slide_levels, write_tiny_slide

from composer_path.conversion import image_source
from composer_path.conversion.convert import convert
from composer_path.conversion.rejected_file import ConvertError
from composer_path.images.pixels import load_image
from composer_path.records.slide_region import SlideRegion, region_png
from composer_path.shards.view import ShardView, StoredSample

openslide = pytest.importorskip("openslide", reason="slide regions need the extra 'wsi'")
LEVELS = tiny_slide_levels()


@pytest.fixture
def bucket() -> Iterator[str]:
    """A store in memory, through fsspec like any other."""
    system = fsspec.filesystem("memory")
    yield "memory://hospital"
    system.rm("/hospital", recursive=True)


def record(image: Any, **keys: Any) -> dict[str, Any]:
    tags = "<image>" * (len(image) if isinstance(image, list) else 1)
    turns = [{"from": "human", "value": f"{tags}What?"}, {"from": "gpt", "value": "Tissue."}]
    return {"image": image, "conversations": turns, **keys}


def region(file: str, x: int = 8, y: int = 4, **keys: int) -> dict[str, Any]:
    return {"file": file, "x": x, "y": y, "width": 20, "height": 16, **keys}


def converted(folder: Path, images: str | Path, records: list[Any], **options: Any) -> list[StoredSample]:
    (folder / "data.json").write_text(json.dumps(records))
    out = folder / f"out{len(list(folder.glob('out*')))}"
    summary = convert(folder / "data.json", images, out, ids="keep", **options)
    assert summary.records == len(records)
    view = ShardView(out)
    return [view.sample(position) for position in range(len(view))]


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_regions_of_a_real_slide_are_stored_with_openslides_pixels_and_its_resolution(tmp_path: Path) -> None:
    folder = os.environ.get("COMPOSER_PATH_HISTOLOGY")
    if not folder:
        pytest.skip("set COMPOSER_PATH_HISTOLOGY to a folder with cmu_small_region.svs")
    places = [(500, 900), (1900, 2700), (-100, -50)]  # the last two lie on an edge
    name = "cmu_small_region.svs"
    regions = [{"file": name, "x": x, "y": y, "width": 448, "height": 448} for x, y in places]
    mixed = [regions[0], "ihc.png"]
    records = [*map(record, regions), record(regions[0], mpp=0.25), record(mixed)]
    samples = converted(tmp_path, folder, records)
    with openslide.OpenSlide(Path(folder, name)) as slide:
        for sample, (x, y) in zip(samples, places, strict=False):
            own = slide.read_region((x, y), 0, (448, 448))
            white = Image.new("RGBA", own.size, "white")
            expected = np.asarray(Image.alpha_composite(white, own).convert("RGB"))
            assert np.array_equal(pixels(sample.images[0]), expected)
    assert [sample.metadata["mpp"] for sample in samples] == [0.499, 0.499, 0.499, 0.25, 0.499]
    assert len(samples[4].images) == 2
    squares = converted(tmp_path, folder, records, resized={"image_size": 56, "fit": "pad", "pad_color": (1, 2, 3)})
    for sample, square in zip(samples, squares, strict=True):
        for image, small in zip(sample.images, square.images, strict=True):
            found = load_stored_image(small, 56, pad_color=(1, 2, 3))
            assert torch.equal(found, load_image(image, 56, pad_color=(1, 2, 3)))


def test_no_resolution_is_made_up(tmp_path: Path) -> None:
    write_tiny_slide(tmp_path / "silent.tiff", LEVELS, pixels_per_cm=None)
    write_tiny_slide(tmp_path / "half.tiff", LEVELS)
    both = [region("half.tiff"), region("half.tiff", level=1)]  # 0.5 and 1 micrometre: no one number holds
    samples = converted(tmp_path, tmp_path, [record(region("silent.tiff")), record(both), record(region("half.tiff"))])
    assert [sample.metadata.get("mpp") for sample in samples] == [None, None, 0.5]


def test_a_region_of_a_slide_that_is_not_there_is_named_without_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"record 0: image 1 of 1: .*\[missing-file\]") as error:
        converted(tmp_path, tmp_path, [record(region("DOE_JANE.svs"))])
    assert "DOE" not in str(error.value)


def test_regions_of_many_slides_of_a_bucket_are_those_of_the_same_slides_on_a_disk(tmp_path: Path, bucket: str) -> None:
    system = fsspec.filesystem("memory")
    (tmp_path / "wsi").mkdir()
    for number in range(5):
        levels = [level + np.uint8(number) for level in LEVELS]
        path = write_tiny_slide(tmp_path / "wsi" / f"{number}.tiff", levels)
        system.pipe_file(f"/hospital/wsi/{number}.tiff", path.read_bytes())
    # Slide after slide in turn and many threads: one that is read must stay on the disk until it has been.
    records = [record(region(f"wsi/{place % 5}.tiff", x=place)) for place in range(40)]
    taken_from_bucket = converted(tmp_path, bucket, records)
    on_disk = converted(tmp_path, tmp_path, records)
    assert [sample.images for sample in taken_from_bucket] == [sample.images for sample in on_disk]
    assert all(sample.metadata["mpp"] == 0.5 for sample in taken_from_bucket)
    assert len(list(Path(image_source._slide_folder().name).iterdir())) <= 2


def test_a_missing_slide_of_a_bucket_is_the_records_fault(tmp_path: Path, bucket: str) -> None:
    fsspec.filesystem("memory").pipe_file("/hospital/a.png", b"no image")
    for image, rule in ((region("none.svs"), "missing-file"), (region("../none.svs"), "path-outside-folder")):
        with pytest.raises(ConvertError, match=rf"record 0: .*\[{rule}\]"):
            converted(tmp_path, bucket, [record(image)])


def test_one_picture_of_several_records_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    loads = []
    load = image_source.ImageSource._load
    monkeypatch.setattr(image_source.ImageSource, "_load", lambda self, image: loads.append(image) or load(self, image))
    samples = converted(tmp_path, tmp_path, [record("a.png")] * 3, workers=1, partition_size=3)
    assert len({sample.images for sample in samples}) == 1
    assert len(loads) <= 2  # two threads may ask at the same moment


def test_a_slides_regions_are_those_that_a_png_of_them_would_be(tmp_path: Path) -> None:
    path = write_tiny_slide(tmp_path / "tiny.tiff", LEVELS)
    (sample,) = converted(tmp_path, tmp_path, [record(region("tiny.tiff"))], check="header")
    assert sample.images[0] == region_png(path, SlideRegion("tiny.tiff", 8, 4, 20, 16))
