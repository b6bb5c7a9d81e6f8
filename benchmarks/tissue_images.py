"""JPEGs of about one megapixel to measure with: crops of real tissue, no two alike.

``COMPOSER_PATH_HISTOLOGY`` may name a folder of larger pictures (JPEG, PNG); without it the small tiles in
``test_data/imgs`` are laid beside each other.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

from PIL import Image

TEST_IMAGES = Path(__file__).resolve().parent.parent / "test_data" / "imgs"
SIDE = 1024  # pixels
QUALITY = 85  # colour at half resolution, as scanners and tile exporters mostly store it
_MIRRORED = (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE)


def write_tissue_images(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Write the first ``count`` images of a fixed series; those that are there already stay."""
    draw, pictures = random.Random(seed), _pictures()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05}.jpg" for number in range(count)]
    for path in paths:
        picture, mirrored = draw.choice(pictures), draw.choice(_MIRRORED)
        left, top = draw.randrange(picture.width - SIDE + 1), draw.randrange(picture.height - SIDE + 1)
        if not path.exists():
            crop = picture.crop((left, top, left + SIDE, top + SIDE)).transpose(mirrored)
            crop.save(path, "JPEG", quality=QUALITY)
    return paths


def _pictures() -> list[Image.Image]:
    """Pictures that are large enough to be cropped."""
    named = os.environ.get("COMPOSER_PATH_HISTOLOGY")
    if named is None:
        return [_mosaic(random.Random(seed)) for seed in range(8)]
    paths = sorted(path for path in Path(named).iterdir() if path.suffix in (".jpg", ".jpeg", ".png"))
    pictures = [Image.open(path).convert("RGB") for path in paths]
    large = [picture for picture in pictures if min(picture.size) >= SIDE]
    if not large:
        raise SystemExit(f"COMPOSER_PATH_HISTOLOGY must hold pictures of at least {SIDE} pixels a side, found none")
    return large


def _mosaic(draw: random.Random) -> Image.Image:
    """Tiles of the test data beside each other, a little larger than a crop."""
    tiles = [Image.open(path).convert("RGB") for path in sorted(TEST_IMAGES.glob("*_160.jpg"))]
    mosaic = Image.new("RGB", (8 * 160, 8 * 160))
    for place in range(64):
        mosaic.paste(draw.choice(tiles), (place % 8 * 160, place // 8 * 160))
    return mosaic
