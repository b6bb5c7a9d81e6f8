"""Sets say whether their dark 16-bit pictures were scaled; a run takes it from them, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from odd_files import gray16_png
from tiny_run import REPO_ROOT

from composer_path.batches.dataset import ConversationDataset
from composer_path.conversion.convert import convert
from composer_path.images.levels import INDEX_KEY, LevelsError, common_levels
from composer_path.images.pixels import ImagePreparation
from composer_path.records.vocabulary import load_tokenizer
from composer_path.shards.select import select_samples
from composer_path.shards.view import ShardView

LEVELS = np.add.outer(np.arange(40), np.arange(40)) * 50  # to 3,900: 12 bits
# The second would still be below 4,096 when it is scaled, and so be scaled twice.
PICTURES = {"dark.png": gray16_png(LEVELS), "night.png": gray16_png(LEVELS // 16)}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets of the same dark pictures: `scaled` and `kept`; and `plain`, of JPEGs."""
    folder = tmp_path_factory.mktemp("levels")
    (folder / "images").mkdir()
    for name, data in PICTURES.items():
        (folder / "images" / name).write_bytes(data)
    turns = [{"from": "human", "value": "What is it?"}, {"from": "assistant", "value": "Tissue."}]
    records: list[dict[str, Any]] = [{"id": name, "image": name, "conversations": turns} for name in PICTURES]
    (folder / "dark.json").write_text(json.dumps(records))
    for name in ("scaled", "kept"):
        convert(folder / "dark.json", folder / "images", folder / name, scale_levels=name == "scaled")
    captions = json.loads((REPO_ROOT / "test_data" / "captions.json").read_text())[:2]
    (folder / "plain.json").write_text(json.dumps(captions))
    convert(folder / "plain.json", REPO_ROOT / "test_data" / "imgs", folder / "plain")
    return folder


def index_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "index.json").read_text())
    return found


def opened(**keywords: Any) -> ConversationDataset:
    keywords |= {"batch_size": 1, "shuffle": False, "num_canonical_nodes": 1, "template": "llava_llama_2"}
    tokenizer = load_tokenizer(REPO_ROOT / "tests" / "golden" / "tiny_llama")
    return ConversationDataset(tokenizer=tokenizer, num_image_tokens=4, image_size=32, **keywords)


def test_an_index_says_it_only_of_a_set_that_has_such_pictures_and_of_what_is_chosen_of_it(
    sets: Path, tmp_path: Path
) -> None:
    assert [index_of(sets / name).get(INDEX_KEY) for name in ("scaled", "kept", "plain")] == [True, False, None]
    select_samples(ShardView(sets / "scaled"), str(tmp_path / "one"), num_samples=1)
    assert index_of(tmp_path / "one")[INDEX_KEY] is True


def test_a_dataset_takes_it_from_its_sets_and_scales_what_they_hold_only_once(sets: Path) -> None:
    scaled, kept = (opened(local=str(sets / name)) for name in ("scaled", "kept"))
    assert (scaled.images.scale_levels, kept.images.scale_levels) == (True, False)
    for dataset in (scaled, kept):
        for at, data in enumerate(PICTURES.values()):
            assert np.array_equal(dataset[at]["pixel_values"][0], dataset.images.load(data))
    bright, dark = (int(one[0]["pixel_values"].max()) for one in (scaled, kept))
    assert bright > 200 and dark < 20
    assert 10 < int(scaled[1]["pixel_values"].max()) < 20  # twice, it would be as bright as the other


def test_sets_that_differ_are_refused_and_those_that_say_nothing_go_with_either(sets: Path) -> None:
    names = {name: {"local": str(sets / name)} for name in ("scaled", "kept", "plain")}
    with pytest.raises(LevelsError, match=r"scaled was converted with --scale-levels, \S*kept without.* in two ways"):
        opened(streams=names)
    del names["kept"]
    assert opened(streams=names).images.scale_levels


def test_what_a_run_says_must_be_what_its_sets_say() -> None:
    scaled, kept, neither = (json.dumps(keys).encode() for keys in ({INDEX_KEY: True}, {INDEX_KEY: False}, {}))
    with pytest.raises(LevelsError, match="scale_levels: found false, but a was converted with --scale-levels"):
        common_levels({"a": scaled, "b": neither}, False)
    with pytest.raises(LevelsError, match="scale_levels: found true, but a was converted without --scale-levels"):
        common_levels({"a": kept}, True)
    assert [common_levels({"a": neither}, wanted) for wanted in (None, True, False)] == [False, True, False]
    assert common_levels({"a": scaled}, True) and not common_levels({"a": kept}, False)
    with pytest.raises(LevelsError, match="must be true or false, found 'yes'"):
        common_levels({"a": json.dumps({INDEX_KEY: "yes"}).encode()}, None)


def test_files_are_scaled_and_what_a_shard_holds_is_not() -> None:
    images = ImagePreparation(32, scale_levels=True)
    night = PICTURES["night.png"]
    assert int(images.load(night).max()) > int(images.load_stored(night).max())
