"""The image processor of an exported folder reads pictures as `ask` does, and refuses what would change them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import IMAGES
from transformers import AutoImageProcessor

from composer_path.hugging_face.image_processor import ComposerPathImageProcessor
from composer_path.images.pixels import ImagePreparation, normalize_image
from composer_path.records.rules import ImageError

PICTURES = sorted(IMAGES.iterdir())[:3]
SETTINGS: dict[str, Any] = {"image_size": 32, "fit": "crop", "pad_color": (9, 8, 7), "max_pixels": 10**6}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def processor() -> ComposerPathImageProcessor:
    return ComposerPathImageProcessor(**SETTINGS, image_mean=MEAN, image_std=STD)


def pixels_of(processor: Any, images: Any) -> torch.Tensor:
    return processor(images, return_tensors="pt")["pixel_values"]


def test_lists_within_lists_come_out_in_order_and_no_picture_gives_none(processor: Any) -> None:
    preparation = ImagePreparation(**SETTINGS)
    squares = torch.stack([preparation.load(path.read_bytes()) for path in PICTURES])
    expected = normalize_image(squares, mean=MEAN, std=STD)
    first, second, third = PICTURES
    assert torch.equal(pixels_of(processor, [[first], [second, None], third.read_bytes()]), expected)
    stack = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in (first, first)])
    assert torch.equal(pixels_of(processor, stack), expected[[0, 0]])
    assert torch.equal(pixels_of(processor, torch.from_numpy(stack).permute(0, 3, 1, 2)), expected[[0, 0]])
    assert pixels_of(processor, []).shape == (0, 3, 32, 32)


def test_a_saved_one_is_the_same(processor: Any, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(again) is type(processor) and again.preparation == processor.preparation
    assert torch.equal(pixels_of(again, PICTURES[0]), pixels_of(processor, PICTURES[0]))


def test_a_file_is_refused_where_a_conversion_refuses_it(processor: Any, tmp_path: Path) -> None:
    """A JPEG whose data end early decodes to a grey rest, which nobody shall be told about as if it were seen."""
    file = io.BytesIO()
    Image.open(PICTURES[0]).convert("RGB").resize((200, 200)).save(file, "JPEG")
    cut = file.getvalue()[: len(file.getvalue()) // 2]
    (tmp_path / "cut.jpg").write_bytes(cut)
    with pytest.raises(ValueError, match=r"image '.*cut\.jpg': an image must decode, found .* \[unreadable-image\]"):
        processor([tmp_path / "cut.jpg"])
    with pytest.raises(ImageError, match="unreadable-image"):
        processor([cut])
    with pytest.raises(ValueError, match=r"image '.*none\.png': there is no such file"):
        processor(str(tmp_path / "none.png"))
    with pytest.raises(ValueError, match="it is a folder"):
        processor(tmp_path)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3)), "found float64 of 4x4x3"),
        (np.zeros((4, 4), np.uint8), "found uint8 of 4x4"),
        (7, "found int"),
    ],
)
def test_what_is_no_picture_is_told_as_what_it_is(processor: Any, image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor([image])


def test_another_way_of_preparing_is_refused(processor: Any) -> None:
    for words in ({"do_normalize": False}, {"size": {"height": 9}}, {"do_rescale": 1}):
        with pytest.raises(ValueError, match=f"'{next(iter(words))}' can't be set here"):
            processor(PICTURES[0], **words)
    expected = pixels_of(processor, PICTURES[0])
    assert torch.equal(processor(PICTURES[0], return_tensors="pt", do_resize=True)["pixel_values"], expected)
