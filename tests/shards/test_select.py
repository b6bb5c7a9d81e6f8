"""Choosing samples by conditions or by chance: copied bit for bit, or nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_sets import (
    NUM_RECORDS,
    SECRET,
    all_samples,
    damage,
)

from composer_path.records.conversation import Conversation
from composer_path.shards.check import check_shards
from composer_path.shards.mds import ShardError
from composer_path.shards.select import Condition, select_samples
from composer_path.shards.view import ShardView, StoredSample
from composer_path.storage.errors import StorageError


@pytest.mark.parametrize(
    ("text", "fitting"),
    [
        ("source=cmu", [0]),
        ("source=cmu|ihc", [0, 1]),
        ("source!=cmu", [1, 2]),
        ("stain=H&E", [0]),
        ("mpp<0.5", [0]),
        ("mpp<=0.5", [0, 1]),
        ("mpp=0.5", [1]),
        ("magnification>=20", [1, 2]),
        ("magnification=20x", [1]),
        ("meta.site.ward=3", [2]),
        ("meta.site!=A", [0, 1, 2]),
        ("images=0", [0, 1, 2]),
        ("turns>2", [2]),
        ("id=b", [1]),
        ("patient=p", []),
    ],
)
def test_conditions_choose_what_they_say(text: str, fitting: list[int]) -> None:
    metadata = [
        {"source": "cmu", "stain": "H&E", "mpp": 0.25, "magnification": "high"},
        {"source": "ihc", "mpp": 0.5, "magnification": "20x"},
        {"magnification": 40, "meta": {"site": {"ward": 3}}},
    ]
    conversation = {"turns": [["human", "a"], ["assistant", "b"]], "system": None}
    longer = {"turns": conversation["turns"] * 2, "system": None}
    samples = [
        StoredSample(n, "s", "abc"[n], Conversation.from_shard(longer if n == 2 else conversation, 0), (), metadata[n])
        for n in range(3)
    ]
    condition = Condition.parse(text)
    assert [sample.position for sample in samples if condition.fits(sample)] == fitting


@pytest.mark.parametrize("text", [SECRET, "=3", "colour=red", "mpp<wide", "mpp<", "conversation=yes"])
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must") as caught:
        Condition.parse(text)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("workers", [1, 2])
def test_chosen_samples_are_copied_bit_for_bit_in_order(any_set: str, tmp_path: Path, workers: int) -> None:
    from streaming import StreamingDataset

    condition = Condition.parse("stain=H&E")
    out = tmp_path / "out"
    summary = select_samples(ShardView(any_set), str(out), [condition], workers=workers)
    expected = [sample for sample in all_samples(any_set) if condition.fits(sample)]
    assert 0 < len(expected) < NUM_RECORDS
    assert summary.records == len(expected)
    chosen = all_samples(out)
    for old, new in zip(expected, chosen, strict=True):
        assert (new.id, new.conversation, new.metadata, new.images) == (
            old.id,
            old.conversation,
            old.metadata,
            old.images,
        )
    assert check_shards(ShardView(out)).problems == []
    card = json.loads((out / "dataset.json").read_text())
    assert card["chosen_from"] == {"records": NUM_RECORDS, "conditions": ["stain=H&E"]}
    assert (card["records"], card["options"]) == (len(expected), {"ids": "keep"})
    reader = StreamingDataset(local=str(out), batch_size=1, shuffle=False, validate_hash="xxh64")
    assert [sample["id"] for sample in reader] == [sample.id for sample in expected]


def test_a_draw_depends_on_its_seed_alone(flat: Path, partitioned: Path, tmp_path: Path) -> None:
    draws = {}
    for name, (place, seed) in {"a": (flat, 0), "b": (partitioned, 0), "c": (flat, 1)}.items():
        select_samples(ShardView(place), str(tmp_path / name), num_samples=12, seed=seed)
        draws[name] = [sample.id for sample in all_samples(tmp_path / name)]
    assert draws["a"] == draws["b"] != draws["c"]
    ids = [sample.id for sample in all_samples(flat)]
    assert draws["a"] == [name for name in ids if name in set(draws["a"])]
    assert len(set(draws["a"])) == 12


def test_choosing_writes_to_a_bucket(bucket: str) -> None:
    select_samples(ShardView(bucket), "memory://bucket/chosen", num_samples=5)
    assert len(all_samples("memory://bucket/chosen")) == 5
    assert check_shards(ShardView("memory://bucket/chosen")).problems == []


def test_a_choice_that_cannot_be_made_writes_nothing(flat: Path, tmp_path: Path) -> None:
    view, out = ShardView(flat), tmp_path / "out"
    with pytest.raises(ShardError, match="no sample fits"):
        select_samples(view, str(out), [Condition.parse("source=nowhere")])
    for number in (0, NUM_RECORDS + 1):
        with pytest.raises(ShardError, match=f"{NUM_RECORDS} samples to draw from, not {number}"):
            select_samples(view, str(out), num_samples=number)
    assert not out.exists()
    with pytest.raises(ShardError, match="must be empty"):
        select_samples(view, str(flat), num_samples=3)
    assert len(all_samples(flat)) == NUM_RECORDS


def test_an_exception_while_choosing_leaves_nothing(
    flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from composer_path.shards import select

    def fail(*arguments: Any) -> None:
        raise StorageError("the disk is full")

    out = tmp_path / "out"
    monkeypatch.setattr(select, "_card", fail)  # after the samples, before the index
    with pytest.raises(StorageError, match="full"):
        select_samples(ShardView(flat), str(out), num_samples=20)
    assert not out.exists()


def test_a_damaged_set_is_never_chosen_from(flat: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(flat, folder)
    damage(folder, "flipped header")
    with pytest.raises(ShardError, match="doesn't fit"):
        select_samples(ShardView(folder), str(tmp_path / "out"), num_samples=NUM_RECORDS)
    assert not (tmp_path / "out").exists()


def test_a_data_card_repeats_no_identifier() -> None:
    texts = [f"patient={SECRET}", f"id!={SECRET}", f"meta.name={SECRET}", "stain=H&E|IHC"]
    assert [str(Condition.parse(text)) for text in texts] == [
        "patient=...",
        "id!=...",
        "meta.name=...",
        "stain=H&E|IHC",
    ]
