"""Regions of slides: OpenSlide's own pixels on white, never the label, and every fault named."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stored_images import load_stored_image
from tiny_dicom import write_tiny_dicom
from tiny_slide import tiny_slide_levels, write_tiny_slide

from composer_path.conversion.convert import convert
from composer_path.images.file import open_image, sanitize_image
from composer_path.images.pixels import load_image
from composer_path.records import slide_region
from composer_path.records.conversation import Conversation
from composer_path.records.rules import RULES, ImageError, RecordError, problems_of
from composer_path.records.slide_region import OpenSlideMissing, SlideRegion, mpp_of, read_region, region_png
from composer_path.shards.view import ShardView

openslide = pytest.importorskip("openslide", reason="slide regions need the extra 'wsi'")
LEVELS = tiny_slide_levels()


def region_of(
    path: Path, x: int, y: int, width: int, height: int, level: int = 0, max_pixels: int = 2**28
) -> Image.Image:
    return read_region(path, SlideRegion("slide", x, y, width, height, level), max_pixels)


@pytest.fixture
def tiny_slide(tmp_path: Path) -> Path:
    """80 x 48 pixels and half of that, 0.5 micrometres a pixel."""
    return write_tiny_slide(tmp_path / "tiny.tiff", LEVELS)


@pytest.fixture(scope="session")
def real_slide() -> Path:
    """CMU-1-Small-Region, an Aperio file (CC0) with a label and a macro picture; 2220 x 2967 pixels."""
    folder = os.environ.get("COMPOSER_PATH_HISTOLOGY")
    if not folder:
        pytest.skip("set COMPOSER_PATH_HISTOLOGY to a folder with cmu_small_region.svs")
    return Path(folder, "cmu_small_region.svs")


def test_a_region_of_a_real_slide_has_openslides_own_pixels(real_slide: Path) -> None:
    with openslide.OpenSlide(real_slide) as slide:
        for x, y, width, height in [(0, 0, 64, 64), (500, 900, 448, 448), (1772, 2519, 448, 448), (700, 3, 1, 97)]:
            own = np.asarray(slide.read_region((x, y), 0, (width, height)))
            assert (own[:, :, 3] == 255).all()
            region = region_of(real_slide, x, y, width, height, 0)
            assert (region.mode, region.size) == ("RGB", (width, height))
            assert np.array_equal(np.asarray(region), own[:, :, :3])
    assert mpp_of(real_slide, 0) == 0.499


def test_the_label_and_the_macro_picture_are_never_read(real_slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("the patient's label was touched")

    with openslide.OpenSlide(real_slide) as slide:
        assert {"label", "macro"} <= set(slide.associated_images)
    slide_region._open_slide.cache_clear()
    monkeypatch.setattr(openslide.AbstractSlide, "associated_images", property(refuse), raising=False)
    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(refuse))
    for name in ("read_associated_image", "get_associated_image_names", "read_associated_image_icc_profile"):
        monkeypatch.setattr(openslide.lowlevel, name, refuse)
    with pytest.raises(AssertionError, match="label"):
        _ = openslide.OpenSlide(real_slide).associated_images
    region = SlideRegion("cmu_small_region.svs", 500, 900, 32, 32)
    assert open_image(region_png(real_slide, region)).size == (32, 32)
    assert mpp_of(real_slide) == 0.499


@pytest.mark.parametrize("level", [0, 1])
def test_each_level_gives_its_own_pixels(tiny_slide: Path, level: int) -> None:
    region = region_of(tiny_slide, 8, 4, 16, 10, level)
    left, top = 8 >> level, 4 >> level
    assert np.array_equal(np.asarray(region), LEVELS[level][top : top + 10, left : left + 16])


@pytest.mark.parametrize("name", ["level0.dcm", "level1.dcm", "label.dcm"])
def test_a_dicom_slide_is_the_scan_whichever_of_its_files_is_named(tmp_path: Path, name: str) -> None:
    path = write_tiny_dicom(tmp_path / "slide", LEVELS) / name
    for level, pixels in enumerate(LEVELS):
        height, width, _ = pixels.shape
        assert np.array_equal(np.asarray(region_of(path, 0, 0, width, height, level)), pixels)
        assert mpp_of(path, level) == 0.5 * 2**level


def test_what_lies_outside_of_the_scan_is_white(tiny_slide: Path) -> None:
    region = np.asarray(region_of(tiny_slide, -3, 40, 90, 20, 0))
    expected = np.full((20, 90, 3), 255, np.uint8)
    expected[:8, 3:83] = LEVELS[0][40:]
    assert np.array_equal(region, expected)


def test_the_stored_file_holds_the_pixels_and_nothing_else(tiny_slide: Path) -> None:
    region = SlideRegion("tiny.tiff", 2, 3, 40, 30)
    data = region_png(tiny_slide, region)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), LEVELS[0][3:33, 2:42])
    assert sanitize_image(data) == data


def test_micrometres_per_pixel_grow_with_the_level(tiny_slide: Path, tmp_path: Path) -> None:
    assert (mpp_of(tiny_slide, 0), mpp_of(tiny_slide, 1)) == (0.5, 1.0)
    assert mpp_of(write_tiny_slide(tmp_path / "silent.tiff", LEVELS, pixels_per_cm=None)) is None


@pytest.mark.parametrize(
    ("x", "y", "width", "height", "level", "rule"),
    [
        (0, 0, 0, 5, 0, "region-outside"),
        (0, 0, 5, -1, 0, "region-outside"),
        (80, 0, 5, 5, 0, "region-outside"),
        (0, 48, 5, 5, 0, "region-outside"),
        (-5, 0, 5, 5, 0, "region-outside"),
        (0, -10, 5, 5, 1, "region-outside"),
        (2**70, 0, 5, 5, 0, "region-outside"),
        (0, 0, 5, 5, 2, "unknown-level"),
        (0, 0, 5, 5, -1, "unknown-level"),
        (0, 0, 100, 101, 0, "too-many-pixels"),
    ],
)
def test_regions_that_make_no_sense_are_refused(
    tiny_slide: Path, x: int, y: int, width: int, height: int, level: int, rule: str
) -> None:
    with pytest.raises(ImageError) as caught:
        region_of(tiny_slide, x, y, width, height, level, max_pixels=10_000)
    assert caught.value.rule == rule
    assert rule in RULES
    assert caught.value.found
    assert caught.value.fix


def test_a_region_with_one_pixel_on_the_scan_is_no_fault(tiny_slide: Path) -> None:
    for x, y, level in [(79, 47, 0), (-4, -4, 0), (-9, -9, 1)]:
        region = np.asarray(region_of(tiny_slide, x, y, 5, 5, level))
        assert ((region != 255).any(axis=-1)).sum() == 1


@pytest.mark.parametrize("kind", ["text", "jpeg", "missing", "folder"])
def test_what_is_no_slide_is_refused_without_its_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "Miller-Jane.svs"
    if kind == "text":
        path.write_text("no slide")
    elif kind == "jpeg":
        Image.new("RGB", (64, 64)).save(path, "JPEG")
    elif kind == "folder":
        path.mkdir()
    for call in (lambda: region_of(path, 0, 0, 8, 8, 0), lambda: mpp_of(path, 0)):
        with pytest.raises(ImageError) as caught:
            call()
        assert caught.value.rule == "unreadable-image"
        assert "Miller" not in str(caught.value)


def test_a_damaged_tile_costs_only_its_own_regions(tmp_path: Path) -> None:
    path = write_tiny_slide(tmp_path / "cut.tiff", LEVELS)
    data = bytearray(path.read_bytes())
    # The table of tile offsets follows the six tiles of level 0 and its resolution; its last entry leads nowhere.
    place = 8 + 6 * 3072 + 8 + 5 * 4
    assert int.from_bytes(data[place : place + 4], "little") == 8 + 5 * 3072
    data[place : place + 4] = (2**31).to_bytes(4, "little")
    path.write_bytes(data)
    whole = LEVELS[0][:16, :16]
    assert np.array_equal(np.asarray(region_of(path, 0, 0, 16, 16, 0)), whole)
    with pytest.raises(ImageError, match="truncated or damaged"):
        region_of(path, 66, 34, 8, 8, 0)
    assert np.array_equal(np.asarray(region_of(path, 0, 0, 16, 16, 0)), whole)


def test_a_slide_that_was_replaced_is_read_anew(tiny_slide: Path) -> None:
    before = np.asarray(region_of(tiny_slide, 0, 0, 8, 8, 0))
    write_tiny_slide(tiny_slide, [level[::-1].copy() for level in LEVELS])
    os.utime(tiny_slide, ns=(1, 1))
    assert not np.array_equal(np.asarray(region_of(tiny_slide, 0, 0, 8, 8, 0)), before)


READ_TOGETHER = """
import multiprocessing, sys
from concurrent.futures import ThreadPoolExecutor
from composer_path.records.slide_region import SlideRegion, read_region

def read(_):
    return read_region(sys.argv[1], SlideRegion("slide", 1, 2, 30, 20)).tobytes()

expected = read(0)
with ThreadPoolExecutor(4) as pool:
    by_threads = set(pool.map(read, range(40)))
with multiprocessing.get_context("fork").Pool(2) as pool:
    by_processes = set(pool.map(read, range(8)))
assert by_threads == by_processes == {expected}
print(expected.hex())
"""


def test_threads_and_forked_processes_read_the_same(tiny_slide: Path) -> None:
    """In an interpreter of its own: this one has threads of earlier tests, which a fork doesn't survive unharmed."""
    words = [sys.executable, "-c", READ_TOGETHER, str(tiny_slide)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert bytes.fromhex(done.stdout) == region_of(tiny_slide, 1, 2, 30, 20, 0).tobytes()


def test_a_missing_package_says_what_to_install(tiny_slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(OpenSlideMissing, match=r"pip install 'composer_path\[wsi\]'"):
        region_of(tiny_slide, 0, 0, 8, 8, 0)


def record(image: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "Which tissue?"}, {"from": "assistant", "value": "Colon."}]
    return {"image": image, "conversations": turns}


def test_a_record_may_name_regions() -> None:
    given = {"file": "a/b.svs", "x": -5, "y": 7, "width": 448, "height": 300, "level": 2}
    conversation = Conversation.from_record(record(given))
    assert conversation.images == (SlideRegion("a/b.svs", -5, 7, 448, 300, 2),)
    assert conversation.turns[0].text == "<image>\nWhich tissue?"
    assert str(conversation.images[0]) == "a/b.svs#x=-5,y=7,width=448,height=300,level=2"
    assert pickle.loads(pickle.dumps(conversation)).images == conversation.images

    several = record([{**given, "level": None}, "c.jpg", {**given, "x": 1}])
    several["conversations"][0]["value"] = "<image><image><image>"
    images = Conversation.from_record(several).images
    assert images == (SlideRegion("a/b.svs", -5, 7, 448, 300, 0), "c.jpg", SlideRegion("a/b.svs", 1, 7, 448, 300, 2))


@pytest.mark.parametrize(
    ("change", "rule", "where"),
    [
        ({"file": None}, "missing-key", "image.file"),
        ({"file": 3}, "wrong-type", "image.file"),
        ({"file": ""}, "wrong-type", "image.file"),
        ({"x": None}, "missing-key", "image.x"),
        ({"y": 1.5}, "wrong-type", "image.y"),
        ({"x": True}, "wrong-type", "image.x"),
        ({"width": 0}, "wrong-type", "image.width"),
        ({"height": "448"}, "wrong-type", "image.height"),
        ({"level": -1}, "wrong-type", "image.level"),
        ({"lvel": 1}, "wrong-type", "image"),
        ({"Miller-Jane": 1}, "wrong-type", "image"),
    ],
)
def test_each_fault_of_a_records_region_is_named(change: dict[str, Any], rule: str, where: str) -> None:
    region = {"file": "a.svs", "x": 0, "y": 0, "width": 4, "height": 4, **change}
    for image, place in ((region, where), ([region], where.replace("image", "image[0]", 1))):
        problems = problems_of(record(image))
        assert [(problem.rule, problem.where) for problem in problems] == [(rule, place)]
        assert "Miller" not in str(problems[0])
        with pytest.raises(RecordError):
            Conversation.from_record(record(image))


def test_a_conversion_stores_regions_and_the_slides_resolution(tmp_path: Path) -> None:
    write_tiny_slide(tmp_path / "tiny.tiff", LEVELS)
    region = {"file": "tiny.tiff", "x": 8, "y": 4, "width": 20, "height": 16}
    given = [region, {**region, "level": 1}, region]
    rows = [record(image) for image in given]
    rows[2]["mpp"] = 0.25
    (tmp_path / "data.json").write_text(json.dumps(rows))
    convert(tmp_path / "data.json", tmp_path, tmp_path / "plain", ids="keep")
    square = {"image_size": 28, "fit": "pad", "pad_color": [1, 2, 3]}
    convert(tmp_path / "data.json", tmp_path, tmp_path / "resized", resized=square)
    plain, resized = ShardView(tmp_path / "plain"), ShardView(tmp_path / "resized")
    for number, value in enumerate(given):
        level = value.get("level", 0)
        (image,) = plain.sample(number).images
        expected = region_of(tmp_path / "tiny.tiff", 8, 4, 20, 16, level)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(image))), np.asarray(expected))
        assert plain.sample(number).metadata["images"] == [str(SlideRegion.from_record(value))]
        stored = load_stored_image(resized.sample(number).images[0], 28, "pad", "pil", (1, 2, 3))
        assert torch.equal(stored, load_image(image, 28, "pad", "pil", (1, 2, 3)))
        assert "tiny" not in str(resized.sample(number).metadata)
    # What the record says counts more than what the file says.
    assert [plain.sample(number).metadata["mpp"] for number in range(3)] == [0.5, 1.0, 0.25]


def test_a_conversion_without_openslide_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_slide(tmp_path / "tiny.tiff", LEVELS)
    region = {"file": "tiny.tiff", "x": 8, "y": 4, "width": 20, "height": 16}
    (tmp_path / "data.json").write_text(json.dumps([record(region)]))
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(OpenSlideMissing):  # even when bad records are to be skipped
        convert(tmp_path / "data.json", tmp_path, tmp_path / "out", on_error="skip")
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_tiff_in_strips_is_no_slide_and_the_message_says_how_to_make_one(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "Miller.tif")
    with pytest.raises(
        ImageError, match=r"a TIFF file in strips, and OpenSlide reads tiled ones; make it tiled"
    ) as error:
        read_region(tmp_path / "Miller.tif", SlideRegion("Miller.tif", 0, 0, 8, 8))
    assert "Miller" not in str(error.value)
