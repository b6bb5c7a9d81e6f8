"""The small training set: sound records, a clean split, balanced questions, and facts that the pixels confirm."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from composer_path.records.conversation import Conversation
from composer_path.records.image_tags import IMAGE_TAG

TRAIN, HELD_OUT = ("captions", "data"), ("heldout_captions", "heldout")
FILES = TRAIN + HELD_OUT
LEAST_GAP = 40  # px between training and held-out tiles of a picture


@pytest.fixture(scope="module")
def folder(repo_root: Path) -> Path:
    return repo_root / "test_data"


@pytest.fixture(scope="module")
def records(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in FILES}


@pytest.fixture(scope="module")
def tiles(folder: Path) -> dict[str, dict[str, Any]]:
    lines = (folder / "tiles.jsonl").read_text(encoding="utf-8").splitlines()
    return {tile["image"]: tile for tile in map(json.loads, lines)}


@pytest.fixture(scope="module")
def pixels(folder: Path, tiles: dict[str, dict[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.asarray(Image.open(folder / "imgs" / name), dtype=np.float64) for name in tiles}


def images_of(record: dict[str, Any]) -> list[str]:
    image = record.get("image", [])
    return [image] if isinstance(image, str) else image


def closed(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    by_kind = defaultdict(list)
    for record in records:
        if "options" in record["meta"]:
            by_kind[record["meta"]["kind"]].append(record)
    return by_kind


def test_every_record_keeps_the_input_rules(records):
    for record in itertools.chain(*records.values()):
        Conversation.from_record(record)
    ids = [record["id"] for record in itertools.chain(*records.values())]
    assert len(set(ids)) == len(ids)
    assert len(records["data"]) >= 60
    assert all(len(records[name]) >= 40 for name in FILES)


def test_captions_fit_the_plain_template(records):
    """The template of stage 1 takes one picture, one question and one answer."""
    for record in records["captions"] + records["heldout_captions"]:
        conversation = Conversation.from_record(record)
        assert conversation.num_images == 1
        assert [turn.role for turn in conversation.turns] == ["human", "assistant"]


def test_data_shows_every_form_a_record_may_take(records):
    conversations = [Conversation.from_record(record) for record in records["data"]]
    assert {0, 1, 2} == {conversation.num_images for conversation in conversations}
    assert any(len(conversation.turns) > 2 for conversation in conversations)
    assert any(conversation.system for conversation in conversations)
    assert any(conversation.image_without_tag for conversation in conversations)
    assert {turn["from"] for record in records["data"] for turn in record["conversations"]} == {
        "human",
        "user",
        "assistant",
        "gpt",
    }


def test_every_image_exists_and_is_used(folder, records, tiles):
    used = {name for record in itertools.chain(*records.values()) for name in images_of(record)}
    assert used == {path.name for path in (folder / "imgs").iterdir()} == set(tiles)
    assert sum(path.stat().st_size for path in (folder / "imgs").iterdir()) < 3_000_000


def test_images_carry_no_metadata(folder, tiles):
    for name in tiles:
        with Image.open(folder / "imgs" / name) as image:
            assert image.mode == "RGB"
            assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


def test_held_out_regions_keep_their_distance_from_training(tiles):
    pairs = 0
    for a, b in itertools.combinations(tiles.values(), 2):
        if a["picture"] == b["picture"] and a["split"] != b["split"]:
            gap_x = max(b["x"] - a["x"] - a["width"], a["x"] - b["x"] - b["width"])
            gap_y = max(b["y"] - a["y"] - a["height"], a["y"] - b["y"] - b["height"])
            assert max(gap_x, gap_y) >= LEAST_GAP
            pairs += 1
    assert pairs


def test_records_use_tiles_of_their_own_side_and_name_their_regions(records, tiles):
    for name, split in [(name, "train") for name in TRAIN] + [(name, "heldout") for name in HELD_OUT]:
        for record in records[name]:
            assert record["meta"]["split"] == split
            used = [tiles[image] for image in images_of(record)]
            assert all(tile["split"] == split for tile in used)
            assert record["meta"]["regions"] == [[t["x"], t["y"], t["width"], t["height"]] for t in used]


@pytest.mark.parametrize("name", ["data", "heldout"])
def test_closed_answers_are_balanced_and_their_questions_give_nothing_away(records, name):
    by_kind = closed(records[name])
    assert set(by_kind) == set(closed(records["data"]))
    assert sum(map(len, by_kind.values())) >= 40
    for kind, asked in by_kind.items():
        answers = Counter(record["meta"]["answer"] for record in asked)
        assert set(answers) == set(asked[0]["meta"]["options"])
        assert max(answers.values()) <= 0.55 * len(asked), kind
        texts: dict[str, Counter[str]] = defaultdict(Counter)
        for record in asked:
            assert len(record["conversations"]) == 2
            question, answer = (turn["value"] for turn in record["conversations"])
            assert answer == record["meta"]["answer"]
            texts[answer][question.replace(IMAGE_TAG, "").strip()] += 1
        first, second = texts.values()
        assert first == second, f"{kind}: a question stands more often with one answer than with the other"


def test_facts_agree_with_the_pixels(tiles, pixels):
    """Decoders of JPEG may differ by a level, so shares may differ by 0.01 and means by one level."""
    for name, tile in tiles.items():
        rgb = pixels[name]
        tissue = (np.ptp(rgb, axis=2) >= 25) | (rgb.sum(axis=2) <= 3 * 190)
        assert tissue.mean() == pytest.approx(tile["tissue_share"], abs=0.01)
        assert (rgb @ [0.299, 0.587, 0.114]).mean() == pytest.approx(tile["luminance"], abs=1)
        if tile["red_minus_blue"] is None:
            assert tissue.mean() < 0.06
        else:
            red, _, blue = rgb[tissue].T
            assert (red - blue).mean() == pytest.approx(tile["red_minus_blue"], abs=1)


# What each answer must mean, written down apart from the script that chose it.
TRUE_OF = {
    "tissue": lambda t: t["tissue_share"] >= 0.6,
    "background": lambda t: t["tissue_share"] <= 0.4,
    "H&E": lambda t: t["picture"] != "ihc.png",
    "IHC": lambda t: t["picture"] == "ihc.png",
    "nest": lambda t: t["picture"] == "hgsc_nest.jpg",
    "stroma": lambda t: t["picture"] == "hgsc_stromal_he.jpg",
    "dark": lambda t: t["luminance"] <= 125 and t["tissue_share"] >= 0.6,
    "pale": lambda t: t["luminance"] >= 150 and t["tissue_share"] >= 0.6,
    "red": lambda t: t["red_minus_blue"] >= 8,
    "blue": lambda t: t["red_minus_blue"] <= -8,
    "inflammatory": lambda t: t["nuclei"]["inflammatory"] > t["nuclei"]["connective"],
    "connective": lambda t: t["nuclei"]["connective"] > t["nuclei"]["inflammatory"],
}
MEANT_BY = {
    "tissue": "tissue",
    "empty background": "background",
    "haematoxylin and eosin": "H&E",
    "immunohistochemistry with DAB": "IHC",
    "tumour nest field": "nest",
    "stroma field": "stroma",
}


@pytest.mark.parametrize("name", ["data", "heldout"])
def test_closed_answers_are_true(records, tiles, name):
    for kind, asked in closed(records[name]).items():
        for record in asked:
            used = [tiles[image] for image in images_of(record)]
            answer = record["meta"]["answer"]
            if kind.startswith("pair_"):
                first, second = (
                    t["tissue_share"] if kind == "pair_tissue" else sum(t["nuclei"].values()) for t in used
                )
                assert answer == ("first" if first > second else "second")
            elif kind == "letter":
                options = dict(re.findall(r"^([AB])\. (.+)$", record["conversations"][0]["value"], re.MULTILINE))
                truths = {letter: TRUE_OF[MEANT_BY[text]](used[0]) for letter, text in options.items()}
                assert truths == {answer: True, "AB".replace(answer, ""): False}
            else:
                assert TRUE_OF[answer](used[0])


AMOUNTS = {
    "an empty tile": (0, 0.02),
    "no tissue to speak of": (0, 0.02),
    "without tissue": (0, 0.02),
    "a little tissue": (0.02, 0.2),
    "more background than tissue": (0.2, 0.4),
    "as much tissue as background": (0.4, 0.6),
    "mostly tissue with some": (0.6, 0.9),
    "almost only tissue": (0.9, 1.0001),
}
PLACES = {
    "tumour nest": "hgsc_nest.jpg",
    "stroma": "hgsc_stromal_he.jpg",
    "FHL2": "ihc.png",
    "0.499": "cmu_small_region.svs",
}


def test_open_answers_are_true(records, tiles):
    """Every amount, percentage, tone, stain, place and count in an open answer about a tile."""
    checked: Counter[str] = Counter()
    for record in itertools.chain(*records.values()):
        if "options" in record["meta"] or not images_of(record):
            continue
        tile = tiles[images_of(record)[0]]
        for turn in record["conversations"][1::2]:
            text = turn["value"]
            for words, (low, high) in AMOUNTS.items():
                if words in text.lower():
                    assert low <= tile["tissue_share"] < high
                    checked["amount"] += 1
            for bound, number in re.findall(r"(about|less than|more than) (\d+) %", text.lower()):
                share = 100 * tile["tissue_share"]
                assert {"about": abs(share - int(number)) <= 5.01, "less than": share < 5, "more than": share > 95}[
                    bound
                ]
                checked["percent"] += 1
            for word in set(re.findall(r"\b(dark|pale|medium-bright)\b", text)) - (
                {"pale"} if "Nothing" in text else set()
            ):
                tone = "dark" if tile["luminance"] <= 125 else "pale" if tile["luminance"] >= 150 else "medium-bright"
                assert word == tone
                checked["tone"] += 1
            is_ihc = tile["picture"] == "ihc.png"
            if re.search(r"H&E|eosin", text):
                assert not is_ihc
                checked["stain"] += 1
            if re.search(r"IHC|DAB|immuno", text):
                assert is_ihc
                checked["stain"] += 1
            for place, picture in PLACES.items():
                if place in text:
                    assert tile["picture"] == picture
                    checked["place"] += 1
            if text in ("tissue", "background"):
                assert TRUE_OF[text](tile)
            counts = re.search(r"count (\d+) neoplastic, (\d+) inflammatory and (\d+) connective", text)
            if counts:
                assert [int(number) for number in counts.groups()] == list(tile["nuclei"].values())
                checked["counts"] += 1
    assert all(checked[what] >= 6 for what in ("amount", "percent", "tone", "stain", "place", "counts"))


def test_keys_of_a_record_say_what_its_source_says(records, tiles):
    for record in itertools.chain(*records.values()):
        pictures = {tiles[image]["picture"] for image in images_of(record)}
        if not pictures:
            assert not record.keys() & {"stain", "organ", "mpp", "patient", "source"}
            continue
        assert record["stain"] == ("IHC (DAB)" if pictures == {"ihc.png"} else "H&E")
        assert record.get("mpp") == (0.499 if pictures == {"cmu_small_region.svs"} else None)
        assert ("organ" in record) == (pictures != {"cmu_small_region.svs"})
        assert record["patient"] and record["source"]


def test_licences_name_every_source(folder, tiles):
    text = (folder / "LICENCES.md").read_text(encoding="utf-8")
    for tile in tiles.values():
        prefix = re.sub(r"x\d+_y\d+_\d+\.jpg$", "", tile["image"])
        assert f"`{prefix}*` | `{tile['picture']}`" in text
    for notice in ("CC0 1.0", "HautaniemiLab", "scikit-image team", "Redistributions in binary form", "AS IS"):
        assert notice in text


def test_readme_counts_the_records(folder, records):
    """The README's table of kinds is what the files hold."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    rows = {
        kind: (int(a), int(b))
        for kind, a, b in re.findall(r"^\| `(\w+)` \|.*\| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    }
    kinds = {name: Counter(record["meta"]["kind"] for record in records[name]) for name in ("data", "heldout")}
    assert rows == {kind: (kinds["data"][kind], kinds["heldout"][kind]) for kind in kinds["data"]}
    for name in FILES:
        assert str(len(records[name])) in text


def test_llama_configuration_fits_the_vocabulary(folder):
    config = json.loads((folder / "llama" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["vocab_size"] == 32_000
    assert not config["tie_word_embeddings"]
    assert config["hidden_size"] % config["num_attention_heads"] == 0
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0


def test_script_writes_the_same_files_again(folder, tmp_path):
    sources = os.environ.get("COMPOSER_PATH_HISTOLOGY")
    if not sources:
        pytest.skip("set COMPOSER_PATH_HISTOLOGY to a folder with the four source pictures")
    script = folder / "make_test_data.py"
    subprocess.run([sys.executable, "-B", str(script), sources, "--out", str(tmp_path)], check=True)
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert written
    for path in written:
        assert (tmp_path / path).read_bytes() == (folder / path).read_bytes(), path
