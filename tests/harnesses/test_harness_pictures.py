from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from composer_path.harnesses.pictures import file_of
from composer_path.images.fitting import rgb_image

TURNED = 6  # EXIF: the picture's right side is up


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_a_picture_keeps_its_pixels(mode: str) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (12, 9, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).convert(mode)
    expected = picture.convert("RGBA") if mode in ("LA", "RGBA") else picture.convert("RGB")
    found = rgb_image(file_of(picture))
    if mode in ("LA", "RGBA"):
        expected = Image.alpha_composite(Image.new("RGBA", expected.size, "white"), expected).convert("RGB")
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_a_picture_keeps_the_side_that_is_up() -> None:
    exif = Image.Exif()
    exif[0x0112] = TURNED
    file = io.BytesIO()
    Image.new("RGB", (8, 4), "red").save(file, "PNG", exif=exif)
    assert rgb_image(file_of(Image.open(file))).size == (4, 8)
