"""Draws docs/algorithms.png: real tiles as each algorithm that changes images shows them.

Usage: `python benchmarks/picture_of_algorithms.py docs/algorithms.png`. The tiles are of test_data, whose LICENCES.md
names their sources.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from composer_path.algorithms import Dihedral, ImageDropout, MppJitter, StainJitter, StainTransfer
from composer_path.algorithms.image_algorithm import ImageAlgorithm
from composer_path.algorithms.stain_transfer import stain_statistics
from composer_path.batches.batch import PackedCollator, Sample

IMAGES = Path(__file__).resolve().parent.parent / "test_data" / "imgs"
TILES = ("hgsc_nest_x0160_y0480_160.jpg", "cmu_x0800_y2800_160.jpg")
SIDE, COLUMNS, LABEL = 128, 6, 16


def tile(name: str) -> torch.Tensor:
    """A tile as the loader hands it over."""
    pixels = np.asarray(Image.open(IMAGES / name).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def shown(algorithm: ImageAlgorithm, image: torch.Tensor, epochs: int) -> list[torch.Tensor]:
    """What an image becomes in so many epochs."""
    sample = Sample(
        sample_id=1,
        input_ids=torch.ones(2, dtype=torch.int64),
        labels=torch.ones(2, dtype=torch.int64),
        pixel_values=image[None],
        is_he=torch.ones(1, dtype=torch.bool),
        source="all",
        problem=None,
    )
    found = []
    for repetition in range(epochs):
        batch = PackedCollator()([sample | {"repetition": repetition}])  # type: ignore[list-item]
        draws = algorithm.draw_in_epoch(batch, 0)
        found.append(algorithm.change(image[None], draws, batch)[0])
    return found


def main(out: str) -> None:
    """Write the picture: a row for each algorithm, the tile as it is first."""
    ours, theirs = map(tile, TILES)
    transfer = StainTransfer(*stain_statistics([theirs[None]]), probability=1.0)
    rows: list[tuple[str, ImageAlgorithm]] = [
        ("stain_jitter: {strength: 0.2}", StainJitter(probability=1.0)),
        ("dihedral", Dihedral()),
        ("mpp_jitter: {strength: 0.25}", MppJitter(0.25, 1.0)),
        ("image_dropout: {probability: 0.3}", ImageDropout(0.3)),
        ("stain_transfer (the last is the reference)", transfer),
    ]
    canvas = Image.new("RGB", (COLUMNS * SIDE, len(rows) * (SIDE + LABEL)), "white")
    draw = ImageDraw.Draw(canvas)
    for at, (name, algorithm) in enumerate(rows):
        pictures = [ours, *shown(algorithm, ours, COLUMNS - 1)]
        if algorithm is transfer:
            pictures = [ours, pictures[1], theirs]
        draw.text((2, at * (SIDE + LABEL) + 2), name, fill="black")
        for column, picture in enumerate(pictures):
            pixels = Image.fromarray(picture.permute(1, 2, 0).numpy())
            canvas.paste(pixels, (column * SIDE, at * (SIDE + LABEL) + LABEL))
    canvas.quantize(128).save(out, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
