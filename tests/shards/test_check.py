"""A check finds each kind of damage, and nothing in a whole set."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from stored_images import resize_image
from tiny_sets import (
    NUM_RECORDS,
    REPO,
    SECRET,
    columns_of,
    damage,
    records,
    write_set,
)

from composer_path.records.conversation import Conversation
from composer_path.records.prompts import get_template
from composer_path.records.tokenize import TextPreparation
from composer_path.records.vocabulary import load_tokenizer, text_encoder
from composer_path.shards.check import LabelCounter, check_shards
from composer_path.shards.columns import pack_images
from composer_path.shards.view import ShardView


@pytest.mark.parametrize("workers", [1, 2])
def test_a_whole_set_has_no_problem(any_set: str, workers: int) -> None:
    result = check_shards(ShardView(any_set), workers)
    assert result.problems == []
    images = sum(Conversation.from_record(record).num_images for record in records())
    assert (result.samples, result.images, result.without_hash) == (NUM_RECORDS, images, 0)
    assert str(result).endswith("no problem")


@pytest.mark.parametrize(
    ("kind", "rules"),
    [
        ("missing", {"unreadable"}),
        ("cut", {"size"}),
        ("flipped", {"hash"}),
        ("flipped header", {"hash"}),
        ("flipped header, no hash", {"damaged"}),
        ("card", {"count"}),
        ("no card", {"missing"}),
        ("orphan", {"not-in-index"}),
        ("stray", {"not-in-index"}),
        ("resized", {"not-resized"}),
    ],
)
@pytest.mark.parametrize("layout", ["flat", "partitioned"])
def test_each_damage_is_found_and_named(
    kind: str, rules: set[str], layout: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(request.getfixturevalue(layout), folder)
    damage(folder, kind)
    result = check_shards(ShardView(folder))
    assert kind != "flipped" or check_shards(ShardView(folder), workers=2) == result
    found = result.problems
    # A flipped byte in an image may also be found when it is decoded.
    assert {problem.rule for problem in found} - {"unreadable-image", "damaged"} == rules - {"damaged"}
    assert found
    assert SECRET not in str(result)
    if kind not in ("resized", "card", "no card", "orphan", "stray"):
        assert len({problem.file for problem in found}) == 1


def test_samples_that_are_bad_under_a_right_hash_are_found(tmp_path: Path) -> None:
    good = columns_of(records()[0])
    image = next((REPO / "test_data" / "imgs").glob("*.jpg")).read_bytes()
    bad = [
        {**good, "images": pack_images([image[: len(image) // 2]])},
        {**good, "images": pack_images([SECRET.encode()])},
        {**good, "images": pack_images([image, image, image])},
        {**good, "images": b"\x07"},
        {**good, "conversation": {"turns": [[SECRET]]}},
        {**good, "metadata": [SECRET]},
        {**good, "images": pack_images([resize_image(image, 28)[:-1]])},
        {**good, "images": pack_images([resize_image(image, 28)])},  # the card says nothing of resizing
    ]
    result = check_shards(ShardView(write_set(tmp_path / "set", [good, *bad, good])))
    expected = ["unreadable-image"] * 2 + ["damaged"] * 4 + ["unreadable-image", "resized"]
    assert [(problem.position, problem.rule) for problem in result.problems] == list(enumerate(expected, start=1))
    assert SECRET not in str(result)


def test_the_check_reads_an_index_without_hashes_and_says_so(samples: list[dict[str, Any]], tmp_path: Path) -> None:
    result = check_shards(ShardView(write_set(tmp_path / "set", samples[:2], hashes=[])))
    assert (result.problems, result.without_hash) == ([], 1)
    assert str(result).endswith("the index has no checksum of 1 shards")


def test_labels_are_counted_under_the_template_that_training_uses(tmp_path: Path, mistral_tokenizer_path: Path) -> None:
    one = {"turns": [["human", "Which?"], ["assistant", "This one."]], "system": None}
    two = {"turns": one["turns"] * 2, "system": None}
    long = {"turns": [["human", "Which? " * 50], ["assistant", "This one."]], "system": None}
    rows = [{"id": "x", "conversation": c, "images": pack_images([]), "metadata": {}} for c in (one, two, long)]
    view = ShardView(write_set(tmp_path / "set", rows))

    def rules(template: str, max_seq_len: int | None = None) -> list[tuple[int | None, str]]:
        text = TextPreparation(get_template(template), 1, max_seq_len)
        counter = LabelCounter(text_encoder(load_tokenizer(mistral_tokenizer_path)), text)
        return [(problem.position, problem.rule) for problem in check_shards(view, 1, counter).problems]

    assert rules("plain") == [(1, "template")]
    assert rules("llava_llama_2") == []
    assert rules("llava_llama_2", 120) == [(2, "no-labels")]
    with pytest.raises(ValueError, match="unknown name 'unknown'"):
        rules("unknown")


def test_what_else_a_conversion_wrote_is_checked_too(partitioned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(partitioned, folder)
    damage(folder, "marked file")
    found = [(problem.file, problem.rule) for problem in check_shards(ShardView(folder)).problems]
    assert found == [("part-00000/image_hashes.bin", "hash"), ("part-00001/done.json", "damaged")]
