"""Writes the small training set from four public pictures: `python make_test_data.py SOURCES`.

SOURCES is a folder with `cmu_small_region.svs`, `hgsc_nest.jpg`, `hgsc_stromal_he.jpg` and `ihc.png`
(README.md says which packages hold them). Everything is drawn from one seed, so the same pictures and the
same Pillow give the same files. Records state nothing but facts measured on the tiles, what the sources say
of the whole picture, and the annotation counts in `tiles.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

from records import SEED, Records
from tiles import PICTURES, cut_tiles


def main(sources: Path, out: Path) -> None:
    """Writes `imgs/`, `tiles.jsonl` and the four record files under `out`."""
    rng = random.Random(SEED)
    folder = out / "imgs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tiles = cut_tiles(sources, folder, rng)
    train, heldout = Records(tiles, "train", rng), Records(tiles, "heldout", rng)
    files = {
        "captions": train.captions(),
        "data": train.all_instructions(),
        "heldout_captions": heldout.captions(),
        "heldout": heldout.all_instructions(),
    }
    for name, records in files.items():
        lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        (out / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    with open(out / "tiles.jsonl", "w", encoding="utf-8") as lines_of_tiles:
        for tile in tiles:
            x, y, width, height = tile.region
            line = {"image": tile.file, "picture": PICTURES[tile.picture].file, "split": tile.split}
            line |= {"x": x, "y": y, "width": width, "height": height} | tile.facts
            lines_of_tiles.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sources", type=Path, help="folder with the four source pictures")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent,
        help="where imgs/ and the JSON files are written",
    )
    main(**vars(parser.parse_args()))
