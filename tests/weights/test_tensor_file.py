"""Folders of tensors: read whole and strictly, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from composer_path.weights.folder import write_folder
from composer_path.weights.tensor_file import WeightsError, read_tensor_folder

SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def write_shards(folder: Path, *shards: dict[str, torch.Tensor]) -> None:
    for name, tensors in zip(SHARDS, shards, strict=True):
        save_file(tensors, folder / name)
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {key: n for n, ts in zip(SHARDS, shards, strict=True) for key in ts}})
    )


def test_a_written_folder_is_read_back_and_nothing_unfinished_lies_in_it(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(300.0), "b": torch.ones(20, 20)}
    for max_shard_size, num_files in (("1KB", 4), ("1MB", 2)):
        write_folder(tmp_path, {"model_type": "x"}, tensors, max_shard_size)
        assert len(list(tmp_path.iterdir())) == num_files
        read = read_tensor_folder(tmp_path)
        assert read.keys() == tensors.keys() and all(torch.equal(read[key], tensors[key]) for key in tensors)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": torch.ones(1), "b": torch.ones(1)}, {"b": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"00002.* holds tensors that another shard holds too: b$"):
        read_tensor_folder(tmp_path)


def test_a_folder_that_holds_a_whole_model_beside_shards_of_another_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": torch.ones(1)}, {"b": torch.zeros(1)})
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"holds two models, model\.safetensors and .*index\.json; remove one"):
        read_tensor_folder(tmp_path)


def test_every_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": torch.ones(1)}, {"b": torch.zeros(1)})
    (tmp_path / SHARDS[0]).unlink()
    with pytest.raises(WeightsError, match=rf"aren't there: {SHARDS[0]}; copy the whole folder"):
        read_tensor_folder(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_what_is_no_index_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(WeightsError, match="is no index of shards"):
        read_tensor_folder(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer; run `git lfs pull`"),
        ("<!DOCTYPE html><html>", "an HTML page"),
        ("", "an empty file"),
    ],
)
def test_what_lies_in_a_files_place_is_named(name: str, content: str, found: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(WeightsError, match=f"{name}' must hold tensors, found {found}"):
        read_tensor_folder(tmp_path)


def test_a_cut_shard_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": torch.ones(8)}, {"b": torch.zeros(8)})
    (tmp_path / SHARDS[1]).write_bytes((tmp_path / SHARDS[1]).read_bytes()[:-4])
    with pytest.raises(WeightsError, match=r"00002.* may be cut or damaged"):
        read_tensor_folder(tmp_path)
