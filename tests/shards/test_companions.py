"""Measured lengths beside a set, and features in it: known to converting, checking, choosing and summing up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_sets import REPO, all_samples, columns_of, edit_index, records, write_set

from composer_path.conversion.destination import Manifest, prepare
from composer_path.conversion.partition import PartitionDone
from composer_path.conversion.rejected_file import ConvertError
from composer_path.conversion.replacement import take_place
from composer_path.images.features import FeatureSet, features_in_index, pack_features
from composer_path.shards.check import check_shards
from composer_path.shards.columns import pack_images
from composer_path.shards.index import Part, publish
from composer_path.shards.select import select_samples
from composer_path.shards.summary import summarize
from composer_path.shards.view import ShardView
from composer_path.storage.places import open_place

LENGTHS = "lengths-0123456789abcdef.npz"
FEATURES = FeatureSet({"name": "tiny"}, "ab" * 8, fit="pad", decoder="pil", pad_color=[1, 2, 3], num_tokens=2, dim=3)
STORED = pack_features(torch.arange(6).view(2, 3).bfloat16())


def featured_set(folder: Path, images: list[list[bytes]], features: dict[str, Any] | None = None) -> ShardView:
    sample = columns_of(records()[0])
    turns = [["human", "What?"], ["assistant", "This."]]
    samples = []
    for number, stored in enumerate(images):
        conversation = {"turns": [["human", "<image>\n" * len(stored) + "What?"], turns[1]], "system": None}
        samples.append(sample | {"id": str(number), "conversation": conversation, "images": pack_images(stored)})
    write_set(folder, samples, card={"features": FEATURES.to_json()})
    edit_index(folder, lambda index: index.update(features=features or FEATURES.to_json()))
    return ShardView(folder)


def conversion() -> Manifest:
    return Manifest(fingerprint="fingerprint", parts=1, num_partitions=1, card={})


# ------------------------------------------------------------------------------------------------- lengths


def test_lengths_beside_a_set_are_no_problem_and_others_are(partitioned: Path, tmp_path: Path) -> None:
    select_samples(ShardView(partitioned), str(tmp_path / "set"), num_samples=5)
    (tmp_path / "set" / LENGTHS).write_bytes(b"anything")
    assert check_shards(ShardView(tmp_path / "set")).problems == []
    (tmp_path / "set" / "lengths-of-mine.npz").write_bytes(b"anything")
    assert [problem.rule for problem in check_shards(ShardView(tmp_path / "set")).problems] == ["not-in-index"]


def test_a_choice_does_not_take_the_lengths_of_the_whole(flat: Path, tmp_path: Path) -> None:
    select_samples(ShardView(flat), str(tmp_path / "set"), num_samples=5)
    (tmp_path / "set" / LENGTHS).write_bytes(b"anything")
    select_samples(ShardView(tmp_path / "set"), str(tmp_path / "part"), num_samples=2)
    assert not list((tmp_path / "part").glob("lengths-*"))
    assert (tmp_path / "set" / LENGTHS).exists()


def test_overwriting_a_set_removes_its_lengths(tmp_path: Path) -> None:
    place = open_place(tmp_path)
    for name in (LENGTHS, "index.json", "dataset.json"):
        place.write(name, [b"{}"])
    beside = prepare(place, conversion(), resume=False, overwrite=True, own=["part-00000"])
    beside.write("part-00000/done.json", [b"{}"])
    take_place(place, [PartitionDone(fingerprint="fingerprint", partition=0, files=[], shards=[])], whole=True)
    publish(place, [Part(partition=0, files=[], shards=[])], {"records": 0})
    assert sorted(place.files()) == ["dataset.json", "index.json", "part-00000/done.json"]


def test_resuming_keeps_lengths_and_refuses_what_only_looks_like_them(tmp_path: Path) -> None:
    place = open_place(tmp_path)
    place.write(LENGTHS, [b"anything"])
    prepare(place, conversion(), resume=True, overwrite=False, own=["part-00000"])
    publish(place, [], {"records": 0})
    assert LENGTHS in place.files()
    place.write("lengths-ABC.npz", [b"anything"])
    for resume in (True, False):
        with pytest.raises(ConvertError, match="nothing but what a conversion wrote, found 1 others"):
            prepare(place, conversion(), resume=resume, overwrite=not resume, own=["part-00000"])
    assert LENGTHS in place.files()


# ------------------------------------------------------------------------------------------------- features


def test_a_set_of_features_has_no_problem_and_is_counted(tmp_path: Path) -> None:
    view = featured_set(tmp_path / "set", [[STORED], [STORED, STORED], []])
    result = check_shards(view)
    assert (result.problems, result.samples, result.images) == ([], 3, 3)
    summary = summarize(view)
    assert summary.image_kinds == {"features": 3}
    assert summary.image_bytes == 3 * len(STORED)
    assert "images stored as features           3" in str(summary)


def test_features_that_are_damaged_or_not_of_the_index_are_found(tmp_path: Path) -> None:
    image = next((REPO / "test_data" / "imgs").glob("*.jpg")).read_bytes()
    other = pack_features(torch.zeros(3, 2).bfloat16())
    view = featured_set(tmp_path / "set", [[STORED], [STORED[:-1]], [other], [image], [image[:100]]])
    found = [(problem.position, problem.rule) for problem in check_shards(view).problems]
    assert found == [(1, "features"), (2, "features"), (3, "features"), (4, "unreadable-image")]


def test_features_that_the_index_does_not_speak_of_are_found(tmp_path: Path) -> None:
    featured_set(tmp_path / "set", [[STORED]])
    edit_index(tmp_path / "set", lambda index: index.pop("features"))
    problems = check_shards(ShardView(tmp_path / "set")).problems
    assert [(problem.position, problem.rule) for problem in problems] == [(0, "features")]


def test_features_of_a_later_version_are_named(tmp_path: Path) -> None:
    view = featured_set(tmp_path / "set", [[]], FEATURES.to_json() | {"dtype": "fp8"})
    (problem,) = check_shards(view).problems
    assert (problem.file, problem.rule) == ("index.json", "features")


def test_a_choice_of_features_says_that_it_holds_them(tmp_path: Path) -> None:
    view = featured_set(tmp_path / "set", [[STORED], [STORED, STORED], [], [STORED]])
    select_samples(view, str(tmp_path / "part"), num_samples=3)
    assert features_in_index((tmp_path / "part" / "index.json").read_bytes()) == FEATURES
    assert json.loads((tmp_path / "part" / "dataset.json").read_text())["features"] == FEATURES.to_json()
    assert check_shards(ShardView(tmp_path / "part")).problems == []
    assert {image for sample in all_samples(tmp_path / "part") for image in sample.images} == {STORED}
