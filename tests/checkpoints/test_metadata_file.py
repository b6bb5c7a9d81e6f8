"""A sharded checkpoint's metadata: read as torch reads it, and compared with the files that are there."""

from __future__ import annotations

import datetime
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from composer_path.checkpoints.metadata_file import read_metadata_file


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    content = {"weight": torch.arange(12.0).view(3, 4), "empty": torch.empty(0), "scalar": torch.tensor(3)}
    save({"state": content, "wct": datetime.timedelta(1), "list": [1, {"a": torch.ones(2)}]}, checkpoint_id=folder)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(written, tmp_path / "checkpoint"))


def test_it_is_what_torch_reads(written: Path) -> None:
    ours, theirs = read_metadata_file(written), FileSystemReader(written).read_metadata()
    for field in ("state_dict_metadata", "planner_data", "storage_data"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert len(ours.storage_data) == 6


def other_path(path: str) -> Callable[[Metadata], None]:
    return lambda metadata: setattr(place(metadata), "relative_path", path)


def place(metadata: Metadata, name: str = "state.weight") -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == name)


def weight(metadata: Metadata) -> Any:
    return metadata.state_dict_metadata["state.weight"]


def rechunk(*boxes: tuple[tuple[int, int], tuple[int, int]]) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        weight(metadata).chunks[:] = [ChunkStorageMetadata(torch.Size(a), torch.Size(b)) for a, b in boxes]
        for offsets, _ in boxes:
            metadata.storage_data.setdefault(
                MetadataIndex("state.weight", torch.Size(offsets)), place(metadata, "state.scalar")
            )

    return change


LIES: dict[str, tuple[Callable[[Metadata], None], str]] = {
    "a file outside": (other_path("../checkpoint/__0_0.distcp"), "_StorageInfo whose relative_path"),
    "a file anywhere": (other_path("/etc/passwd"), "_StorageInfo whose relative_path"),
    "another kind of file": (other_path(".metadata"), "_StorageInfo whose relative_path"),
    "a file that isn't there": (other_path("__7_0.distcp"), "no plain file __7_0"),
    "an offset below 0": (lambda m: setattr(place(m), "offset", -1), "_StorageInfo whose offset"),
    "a length below 0": (lambda m: setattr(place(m), "length", -1), "_StorageInfo whose length"),
    "an end behind the file": (lambda m: setattr(place(m), "length", 2**40), "over each other or beyond"),
    "an offset over another": (lambda m: setattr(place(m), "offset", 1), "over each other or beyond"),
    "a transformation": (lambda m: setattr(place(m), "transform_descriptors", ["zstd"]), "transform_descriptors"),
    "a size of 4 PB": (
        lambda m: m.state_dict_metadata.update(
            {
                "state.weight": TensorStorageMetadata(
                    weight(m).properties,
                    torch.Size([2**25, 2**25]),
                    [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2**25, 2**25]))],
                )
            }
        ),
        "larger than its",
    ),
    "a chunk beyond": (rechunk(((1, 0), (3, 4))), "beyond its size"),
    "a hole": (rechunk(((0, 0), (2, 4))), "aren't the whole of it"),
    "chunks over each other": (rechunk(((0, 0), (2, 4)), ((1, 0), (1, 4))), "over each other"),
    "another dimension": (lambda m: setattr(weight(m), "size", torch.Size([12])), "don't fit it"),
    "no place": (lambda m: m.storage_data.pop(MetadataIndex("state.weight", torch.Size([0, 0]))), "no place of entry"),
    "a place too much": (
        lambda m: m.storage_data.update({MetadataIndex("more"): place(m, "wct")}),
        "places of entries that aren't there",
    ),
    "a way to nowhere": (lambda m: m.planner_data.update({"more": ("more",)}), "a way to"),
    "a way of other things": (lambda m: m.planner_data.update({"wct": ("wct", 1.5)}), "a way to"),
    "a sparse tensor": (lambda m: setattr(weight(m).properties, "layout", torch.sparse_coo), "numbers in a grid"),
    "another field": (lambda m: setattr(m, "evil", 1), "a field 'evil'"),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_does_not_fit_the_files_is_refused(lie: str, folder: Path) -> None:
    change, message = LIES[lie]
    metadata = FileSystemReader(folder).read_metadata()
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=rf"must hold records .*{message}.*; take another"):
        read_metadata_file(folder)


def test_a_linked_file_is_refused(folder: Path) -> None:
    (folder / "__0_0.distcp").rename(folder / "elsewhere")
    (folder / "__0_0.distcp").symlink_to(folder / "elsewhere")
    with pytest.raises(ValueError, match=r"no plain file __0_0\.distcp"):
        read_metadata_file(folder)


def test_a_cut_file_is_refused(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"entries of __0_0\.distcp over each other or beyond its end"):
        read_metadata_file(folder)


def test_two_thousand_damaged_ones_are_read_or_refused_in_one_line(folder: Path) -> None:
    whole, draw, refused = (folder / ".metadata").read_bytes(), random.Random(10), 0
    for _ in range(2000):
        data = bytearray(whole)
        at = draw.randrange(len(data))
        if draw.random() < 0.8:
            data[at] ^= 1 << draw.randrange(8)
        else:
            del data[at : at + draw.randrange(1, 9)]
        (folder / ".metadata").write_bytes(data)
        try:
            read_metadata_file(folder)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 1000 < refused < 2000  # some only change a name or who wrote it


def test_chunks_of_a_grid_are_the_whole(folder: Path) -> None:
    """As a tensor that is sharded in two dimensions; also where one rank has nothing."""
    metadata = FileSystemReader(folder).read_metadata()
    first = metadata.storage_data.pop(MetadataIndex("state.weight", torch.Size([0, 0])))
    boxes = [((0, 0), (2, 2)), ((0, 2), (2, 2)), ((2, 0), (1, 2)), ((2, 2), (1, 2)), ((3, 0), (0, 2))]
    weight(metadata).chunks[:] = [ChunkStorageMetadata(torch.Size(a), torch.Size(b)) for a, b in boxes]
    with (folder / "__0_0.distcp").open("ab") as file:
        for offsets, _ in boxes:
            index = MetadataIndex("state.weight", torch.Size(offsets))
            metadata.storage_data[index] = type(first)("__0_0.distcp", file.tell(), first.length)
            file.write(bytes(first.length))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert len(weight(read_metadata_file(folder)).chunks) == 5
