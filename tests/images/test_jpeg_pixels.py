"""Claims about JPEGs decoded by simplejpeg: Pillow's and torchvision's pixels, and their verdicts."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from test_pixels import picture

from composer_path.images import jpeg_pixels as module
from composer_path.images.jpeg_pixels import jpeg_pixels
from composer_path.images.pixels import Decoder, load_image
from composer_path.records.rules import ImageError

pytest.importorskip("simplejpeg")

KINDS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "coarse": {"quality": 20},
    "rgb": {"keep_rgb": True},
}


def jpeg(kind: str = "4:2:0", mode: str = "RGB", size: tuple[int, int] = (203, 151)) -> bytes:
    file = io.BytesIO()
    picture(*size).convert(mode).save(file, "JPEG", **KINDS[kind])
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_pillows(kind: str, mode: str) -> None:
    for size in ((203, 151), (16, 17), (1, 9)):
        data = jpeg(kind, mode, size)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        found, four = jpeg_pixels(data, "RGB"), jpeg_pixels(data, "RGBX")
        assert found is not None and four is not None, (kind, size)
        assert np.array_equal(found, expected) and np.array_equal(four[..., :3], expected), (kind, size)


@pytest.mark.parametrize("decoder", ["pil", "torchvision"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prepared_image_is_the_same_with_and_without_it(
    kind: str, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [(jpeg(kind, mode), fit) for mode in ("RGB", "L") for fit in ("pad", "crop")]
    found = [load_image(data, 96, fit, decoder) for data, fit in cases]
    monkeypatch.setattr("composer_path.images.pixels.jpeg_pixels", lambda *_: None)
    for pixels, (data, fit) in zip(found, cases, strict=True):
        assert torch.equal(pixels, load_image(data, 96, fit, decoder)), (kind, fit)


def test_it_leaves_what_is_not_flawless_to_the_decoder_that_was_chosen() -> None:
    data = jpeg()
    half = data[: len(data) // 2]
    for damaged in (half, half + b"\xff\xd9", data[:-2], data[:400] + b"\xff\xd9", b"\xff\xd8\xff"):
        assert jpeg_pixels(damaged, "RGB") is None
    assert jpeg_pixels(data, "RGB") is not None


@pytest.mark.parametrize("decoder", ["pil", "torchvision"])
def test_a_cut_file_is_an_error_still(decoder: Decoder) -> None:
    data = jpeg()
    for end in (len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(ImageError) as caught:
            load_image(data[:end], 96, "pad", decoder)
        assert caught.value.rule == "unreadable-image"


def test_another_libjpeg_of_pillows_is_not_mixed_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.features.check_feature", lambda name: False)
    assert module._decoder.__wrapped__() is None
