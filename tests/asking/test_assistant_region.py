"""A region of a slide as an assistant sees it: what training on the same region saw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_model import tiny_model_folder
from tiny_slide import tiny_slide_levels, write_tiny_slide

from composer_path.asking.assistant import Assistant
from composer_path.conversion.convert import convert
from composer_path.records.slide_region import SlideRegion
from composer_path.shards.view import ShardView

pytest.importorskip("openslide", reason="slide regions need the extra 'wsi'")


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    return Assistant.from_pretrained(tiny_model_folder(tmp_path_factory.getbasetemp() / "tiny_model"))


def test_a_region_is_seen_as_in_training(assistant: Assistant, tmp_path: Path) -> None:
    path = write_tiny_slide(tmp_path / "tiny.tiff", tiny_slide_levels())
    region = {"file": "tiny.tiff", "x": 60, "y": 4, "width": 40, "height": 16}  # reaches over the edge
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Tissue."}]
    (tmp_path / "data.json").write_text(json.dumps([{"image": region, "conversations": turns}]))
    convert(tmp_path / "data.json", tmp_path, tmp_path / "out")
    trained_on = assistant.images.load_stored(ShardView(tmp_path / "out").sample(0).images[0])
    assert torch.equal(assistant.read_image(path, SlideRegion.from_record(region)), trained_on)


@pytest.mark.parametrize(("x", "level", "rule"), [(500, 0, "region-outside"), (0, 7, "unknown-level")])
def test_a_region_that_is_not_on_the_slide_is_named(
    assistant: Assistant, tmp_path: Path, x: int, level: int, rule: str
) -> None:
    path = write_tiny_slide(tmp_path / "tiny.tiff", tiny_slide_levels())
    with pytest.raises(ValueError, match=rule):
        assistant.read_image(path, SlideRegion("tiny.tiff", x, 0, 10, 10, level))


def test_a_region_of_a_picture_that_is_no_slide_is_named(assistant: Assistant, tmp_path: Path) -> None:
    (tmp_path / "no_slide.svs").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"no_slide\.svs.*OpenSlide doesn't know"):
        assistant.read_image(tmp_path / "no_slide.svs", SlideRegion("no_slide.svs", 0, 0, 10, 10))
