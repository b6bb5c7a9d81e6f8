"""The tiles of the small training set: where they are cut from, and what is measured on them.

The facts of a tile are measured on the stored JPEG, not on the source, so that anyone can check them.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import wording
from PIL import Image

TILE = 160  # px; small, so that four pictures give some two hundred tiles
NUCLEI_SQUARE = 448  # px; the squares for which nuclei were counted; stored at half the resolution
JPEG_QUALITY = 90

# A pixel is tissue when it is coloured or dark; an empty slide is neither.
COLOURED, DARK_PIXEL = 25, 190  # least spread of the channels, largest mean of the channels (levels of 255)
MOSTLY, HARDLY = 0.60, 0.40  # closed questions leave out what lies between
STAIN_NEEDS = 0.30  # share of tissue from which the stain can be seen at all
DARK, PALE = 125, 150  # mean luminance of a tile (levels of 255)
STRONGER = 8  # mean red minus mean blue over tissue (levels of 255)
EMPTY = 0.02  # share of tissue below which a tile counts as empty glass
PAIR_GAP = 0.25  # least difference of tissue shares in a pair
NUCLEI_GAP = 20  # least difference of annotated nuclei in a pair


@dataclass(frozen=True)
class Picture:
    """A source picture, what is stated about it, and the corners of its tiles on both sides of the split."""

    file: str
    patient: str
    stain: str
    train: list[tuple[int, int]]
    heldout: list[tuple[int, int]]
    organ: str | None = None
    mpp: float | None = None
    magnification: str | None = None


def _grid(xs: range, *rows: range | list[int]) -> list[tuple[int, int]]:
    return [(x, y) for y in itertools.chain(*rows) for x in xs]


# Training and held-out rows are at least 40 px apart in every picture. In the small IHC picture, tiles of one
# side of the split overlap one another.
PICTURES = {
    "cmu": Picture(
        "cmu_small_region.svs", "CMU-1", "H&E",
        _grid(range(0, 2060, TILE), range(0, 1761, TILE), [2640, 2800]),
        _grid(range(0, 2060, TILE), range(1960, 2441, TILE)),
        mpp=0.499, magnification="20x",
    ),
    "hgsc_nest": Picture(
        "hgsc_nest.jpg", "HGSC-1", "H&E",
        _grid(range(0, 1300, TILE), range(0, 641, TILE)), _grid(range(0, 1300, TILE), range(896, 1217, TILE)),
        organ="ovarian high-grade serous carcinoma, tumour nest",
    ),
    "hgsc_stroma": Picture(
        "hgsc_stromal_he.jpg", "HGSC-2", "H&E",
        _grid(range(0, 1300, TILE), range(0, 641, TILE)), _grid(range(0, 1300, TILE), range(896, 1217, TILE)),
        organ="ovarian high-grade serous carcinoma, stroma",
    ),
    "ihc": Picture(
        "ihc.png", "CMMI-1", "IHC (DAB)",
        _grid(range(0, 353, 70), [0, 50, 100]), _grid(range(0, 353, 88), [300, 352]),
        organ="colonic glands, FHL2",
    ),
}  # fmt: skip

NUCLEI_CLASSES = ("neoplastic", "inflammatory", "connective")
# The polygons of histolytics 0.3.0 counted in 448 px squares:
# (picture, x, y) -> neoplastic, inflammatory, connective
NUCLEI = {
    ("hgsc_nest", 0, 0): (9, 138, 30),
    ("hgsc_nest", 448, 0): (33, 99, 13),
    ("hgsc_nest", 896, 0): (1, 37, 53),
    ("hgsc_stroma", 0, 0): (0, 0, 44),
    ("hgsc_stroma", 448, 0): (0, 1, 33),
    ("hgsc_stroma", 896, 0): (0, 2, 38),
    ("hgsc_nest", 0, 896): (0, 99, 42),
    ("hgsc_nest", 448, 896): (40, 58, 35),
    ("hgsc_nest", 896, 896): (38, 9, 24),
    ("hgsc_stroma", 0, 896): (0, 0, 41),
    ("hgsc_stroma", 448, 896): (0, 2, 21),
    ("hgsc_stroma", 896, 896): (0, 10, 42),
}

# How many tiles of each sort are kept.
TILES = {
    "train": {
        "cmu tissue": 34, "cmu background": 34, "cmu between": 6, "hgsc_nest": 24, "hgsc_stroma": 24,
        "ihc": 18,
    },
    "heldout": {
        "cmu tissue": 12, "cmu background": 12, "cmu between": 2, "hgsc_nest": 12, "hgsc_stroma": 12,
        "ihc": 10,
    },
}  # fmt: skip


@dataclass
class Tile:
    """A stored tile: where it was cut and what was measured on it."""

    file: str
    picture: str
    split: str
    region: tuple[int, int, int, int]  # x, y, width, height in the source picture
    facts: dict[str, Any] = field(default_factory=dict)


def measure(path: Path) -> dict[str, Any]:
    """Measures the facts that records may state on a stored tile.

    Returns:
        `tissue_share` (0 to 1), `luminance` (mean, levels of 255) and `red_minus_blue` (mean over tissue
        pixels, levels of 255; None where there is hardly any tissue).
    """
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float64)
    spread = pixels.max(axis=2) - pixels.min(axis=2)
    tissue = (spread >= COLOURED) | (pixels.mean(axis=2) <= DARK_PIXEL)
    difference = (pixels[..., 0] - pixels[..., 2])[tissue]
    return {
        "tissue_share": round(float(tissue.mean()), 3),
        "luminance": round(float((pixels @ [0.299, 0.587, 0.114]).mean()), 1),
        "red_minus_blue": round(float(difference.mean()), 1) if tissue.mean() > 0.05 else None,
    }


def classify(tile: Tile, kind: str) -> str | None:
    """Returns the answer of a closed question about a tile, None where the tile lies between the answers."""
    facts = tile.facts
    if kind == "tissue":
        return side(facts["tissue_share"], HARDLY, MOSTLY, "background", "tissue")
    if kind == "stain" and facts["tissue_share"] >= STAIN_NEEDS:
        return wording.SHORT_STAIN[PICTURES[tile.picture].stain]
    if kind == "field":
        return {"hgsc_nest": "nest", "hgsc_stroma": "stroma"}.get(tile.picture)
    if kind == "tone" and facts["tissue_share"] >= MOSTLY:  # or it would ask for background again
        return side(facts["luminance"], DARK, PALE, "dark", "pale")
    if kind == "channel" and facts["tissue_share"] >= MOSTLY:
        return side(facts["red_minus_blue"], -STRONGER, STRONGER, "blue", "red")
    if kind == "nuclei_class" and "nuclei" in facts:
        nuclei = facts["nuclei"]
        return "inflammatory" if nuclei["inflammatory"] > nuclei["connective"] else "connective"
    return None


def side(value: float, low: float, high: float, below: str, above: str) -> str | None:
    """Returns the name of the side on which a value lies, None between the limits."""
    return below if value <= low else above if value >= high else None


def cut_tiles(sources: Path, folder: Path, rng: random.Random) -> list[Tile]:
    """Cuts all regions, keeps as many of each sort as TILES says, and removes the rest."""
    tiles: list[Tile] = []
    for name, picture in PICTURES.items():
        with Image.open(sources / picture.file) as opened:
            image = opened.convert("RGB")
        for split in TILES:
            for x, y in getattr(picture, split):
                tiles.append(_store(image, folder, name, split, x, y, TILE))
        for (owner, x, y), counts in NUCLEI.items():
            if owner == name:
                tile = _store(image, folder, name, "train" if y == 0 else "heldout", x, y, NUCLEI_SQUARE)
                tile.facts["nuclei"] = dict(zip(NUCLEI_CLASSES, counts, strict=True))
                tiles.append(tile)
    kept = [tile for tile in tiles if "nuclei" in tile.facts]
    for split, wanted in TILES.items():
        for sort, number in wanted.items():
            name, _, amount = sort.partition(" ")
            fitting = [t for t in tiles if t.picture == name and t.split == split and "nuclei" not in t.facts]
            if amount:
                fitting = [t for t in fitting if (classify(t, "tissue") or "between") == amount]
            if amount == "background":  # empty glass alone is too easy: half of them show some tissue
                empty = [t for t in fitting if t.facts["tissue_share"] < EMPTY]
                some = [t for t in fitting if t.facts["tissue_share"] >= EMPTY]
                some = rng.sample(some, min(number // 2, len(some)))
                fitting = some + rng.sample(empty, number - len(some))
            kept += rng.sample(fitting, number)
    for tile in tiles:
        if tile not in kept:
            (folder / tile.file).unlink()
    return sorted(kept, key=lambda tile: tile.file)


def _store(image: Image.Image, folder: Path, name: str, split: str, x: int, y: int, size: int) -> Tile:
    tile = Tile(f"{name}_x{x:04}_y{y:04}_{size}.jpg", name, split, (x, y, size, size))
    pixels = image.crop((x, y, x + size, y + size))
    if size == NUCLEI_SQUARE:
        pixels = pixels.reduce(2)
    pixels.save(folder / tile.file, quality=JPEG_QUALITY, optimize=True)
    tile.facts = measure(folder / tile.file)
    return tile
