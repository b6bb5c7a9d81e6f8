"""Claims about measured lengths: what they belong to, how they are kept, and how another run's are refused."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composer_path.records.prompts import get_template
from composer_path.records.tokenize import TextPreparation
from composer_path.records.vocabulary import load_tokenizer
from composer_path.shards.lengths import (
    LengthsError,
    LengthsKey,
    SampleLengths,
    has_lengths,
    lengths_key,
    lengths_place,
    read_lengths,
    template_hash,
    tokenizer_hash,
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


# ------------------------------------------------------------------------------------------------ what they depend on


@pytest.fixture(scope="module")
def tokenizer(mistral_tokenizer_path: Path) -> Any:
    return load_tokenizer(mistral_tokenizer_path)


def test_a_tokenizer_is_known_by_its_content_not_by_its_path(
    tokenizer: Any, mistral_tokenizer_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(mistral_tokenizer_path, tmp_path / "copy")
    assert tokenizer_hash(load_tokenizer(tmp_path / "copy")) == tokenizer_hash(tokenizer)


def test_whatever_changes_ids_changes_a_tokenizers_hash(tokenizer: Any, mistral_tokenizer_path: Path) -> None:
    changed = [copy.deepcopy(load_tokenizer(mistral_tokenizer_path)) for _ in range(3)]
    changed[0].add_tokens(["<marker>"], special_tokens=True)
    changed[1].chat_template = "{{ messages }}"
    changed[2].eos_token = "<unk>"
    hashes = {tokenizer_hash(one) for one in (tokenizer, *changed)}
    assert len(hashes) == 4


def test_another_vocabulary_has_another_hash(tokenizer: Any, shared_byte_level_tokenizer: Any) -> None:
    assert tokenizer_hash(shared_byte_level_tokenizer) != tokenizer_hash(tokenizer)


def test_templates_differ_by_name_and_by_every_setting() -> None:
    templates = ["plain", "llava_llama_2", {"name": "llava_llama_2", "system": None}, "chat_template"]
    templates += [{"name": "chat_template", "date": "2020-01-01"}, {"name": "chat_template", "system": "Hi."}]
    hashes = [template_hash(get_template(template)) for template in templates]
    assert len(set(hashes)) == len(templates)
    assert hashes == [template_hash(get_template(template)) for template in templates]
    assert hashes[1].startswith("llava_llama_2-")


def test_a_key_holds_no_text(tokenizer: Any) -> None:
    template = get_template({"name": "llava_llama_2", "system": "You look at slides of Mr. Miller."})
    key = lengths_key(b"{}", tokenizer, TextPreparation(template, 8, 512))
    assert "Miller" not in str(key)
    assert key == lengths_key(b"{}", tokenizer, TextPreparation(template, 8, 512))


def test_images_of_different_lengths_are_refused(tokenizer: Any) -> None:
    with pytest.raises(LengthsError, match="the same number of tokens for every image"):
        lengths_key(b"{}", tokenizer, TextPreparation(get_template("plain"), lambda index: 4, 512))
