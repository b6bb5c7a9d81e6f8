"""Claims about measured lengths: what they belong to, how they are kept, and how another run's are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from composer_path.shards.lengths import (
    LengthsError,
    LengthsKey,
    SampleLengths,
    has_lengths,
    lengths_place,
    read_lengths,
    write_lengths,
)
from composer_path.storage.places import Folder, open_place

KEY = LengthsKey("1f" * 8, "2e" * 8, "plain-3d", num_image_tokens=8, max_seq_len=512, image_position="front")
LENGTHS = SampleLengths(*(np.array(column, np.int32) for column in ([90, 1, 512], [30, 0, 400], [1, 0, 2])))


def assert_same(found: SampleLengths, expected: SampleLengths) -> None:
    for field in dataclasses.fields(SampleLengths):
        assert np.array_equal(getattr(found, field.name), getattr(expected, field.name))
        assert getattr(found, field.name).dtype == np.int32


@pytest.mark.parametrize("address", ["{}/new/folder", "memory://lengths/{}"])
def test_lengths_come_back_from_a_folder_and_a_bucket(address: str, tmp_path: Path) -> None:
    place = open_place(address.format(tmp_path))
    assert not has_lengths(place, KEY)
    assert write_lengths(place, KEY, LENGTHS) == KEY.file_name
    assert list(place.files()) == [KEY.file_name]
    assert_same(read_lengths(place, KEY, num_samples=3), LENGTHS)
    assert has_lengths(place, KEY)


CHANGES = {
    "index": ("9" * 16, r"the set \(its index.json\)"),
    "tokenizer": ("9" * 16, "tokenizer"),
    "template": ("llava_llama_2-3d", "template"),
    "num_image_tokens": (128, r"num_image_tokens \(8 there, 128 here\)"),
    "max_seq_len": (4096, r"max_seq_len \(512 there, 4096 here\)"),
    "image_position": ("inline", r"image_position \(front there, inline here\)"),
    "format": (2, r"format \(1 there, 2 here\)"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_lengths_of_another_run_are_refused_with_what_differs_and_what_to_do(name: str, tmp_path: Path) -> None:
    write_lengths(Folder(tmp_path), KEY, LENGTHS)
    value, words = CHANGES[name]
    other = dataclasses.replace(KEY, **{name: value})
    assert other.file_name != KEY.file_name
    message = f"found lengths of samples, but measured for another {words}; measure with composer-path lengths"
    with pytest.raises(LengthsError, match=message):
        read_lengths(Folder(tmp_path), other)


def test_every_part_of_the_key_is_tried_above() -> None:
    assert CHANGES.keys() == {field.name for field in dataclasses.fields(LengthsKey)}


def test_of_several_the_nearest_is_compared_and_all_are_kept(tmp_path: Path) -> None:
    place = Folder(tmp_path)
    keys = [KEY, dataclasses.replace(KEY, max_seq_len=128, tokenizer="0" * 16)]
    for key in keys:
        write_lengths(place, key, LENGTHS)
    with pytest.raises(LengthsError, match=r"for another max_seq_len \(512 there, 256 here\); measure"):
        read_lengths(place, dataclasses.replace(KEY, max_seq_len=256))
    for key in keys:
        assert_same(read_lengths(place, key), LENGTHS)


def test_where_nothing_was_measured_the_command_is_named(tmp_path: Path) -> None:
    for place in (Folder(tmp_path), Folder(tmp_path / "nowhere")):
        with pytest.raises(
            LengthsError, match="found no lengths of this set's samples; measure with composer-path lengths"
        ):
            read_lengths(place, KEY)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another set", "count", "pickle"])
def test_damaged_lengths_are_never_used(damage: str, tmp_path: Path) -> None:
    place = Folder(tmp_path)
    write_lengths(place, KEY, LENGTHS)
    path = tmp_path / KEY.file_name
    data = path.read_bytes()
    count = 3
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        middle = data.index(b"tokens.npy") + 60
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "another set":
        other = dataclasses.replace(KEY, index="0" * 16)
        write_lengths(place, other, LENGTHS)
        (tmp_path / other.file_name).rename(path)
    elif damage == "count":
        count = 4
    else:
        with open(path, "wb") as file:
            np.savez(file, tokens=np.array([{"a": 1}], dtype=object))
    with pytest.raises(LengthsError, match=rf"{KEY.file_name}: found .*; delete it, and measure with"):
        read_lengths(place, KEY, num_samples=count)


def test_lengths_lie_beside_the_set_or_where_they_are_wanted(tmp_path: Path) -> None:
    assert str(lengths_place("s3://bucket/set", str(tmp_path))) == str(tmp_path)
    assert str(lengths_place(str(tmp_path), None)) == str(tmp_path)
