"""An MDS file: where one ends, and what is read of it. That the bytes are Streaming's is tested with the writer."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import pytest

from composer_path.shards.columns import COLUMNS, pack_images
from composer_path.shards.mds import DamagedShard, MdsFile, MdsFormat, open_mds
from composer_path.shards.writer import ShardWriter
from composer_path.storage.places import Folder


def sample(number: int, image_bytes: int = 10) -> dict[str, Any]:
    images = pack_images([b"x" * image_bytes])
    return {"id": str(number), "conversation": {"n": number}, "images": images, "metadata": {}}


def sizes(folder: Path, size_limit: int) -> list[int]:
    writer = ShardWriter(Folder(folder), "part-00000", COLUMNS, size_limit, ["xxh64"])
    for number in range(3):
        writer.write(sample(number))
    writer.finish()
    writer.close()
    return [shard["raw_data"]["bytes"] for shard in writer.shards]


def test_a_shard_of_exactly_the_limit_is_one_and_a_byte_less_makes_two(tmp_path: Path) -> None:
    (size,) = sizes(tmp_path / "large", 9_999)  # as many digits as the limits below: it stands in the file
    size -= len("9999") - len(str(size))
    assert sizes(tmp_path / "exact", size) == [size]
    assert (tmp_path / "exact" / "part-00000" / "shard.00000.mds").stat().st_size == size
    assert len(sizes(tmp_path / "less", size - 1)) == 2


class Counting(io.BytesIO):
    """A file that notes how much is read of it."""

    num_read = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.num_read += len(data)
        return data


def test_chosen_columns_are_read_without_the_others() -> None:
    samples = [MdsFormat(COLUMNS, 2**20, []).encode(sample(number, 50_000)) for number in range(3)]
    parts, entry = MdsFormat(COLUMNS, 2**20, []).join(samples, "a.mds")
    file = Counting(b"".join(parts))
    mds = open_mds(file, entry, page=64)
    wanted = [mds.read(number, {"conversation": None, "images": 4}) for number in range(3)]
    assert wanted == [{"conversation": {"n": number}, "images": b"\1\0\0\0"} for number in range(3)]
    assert file.num_read < 1_000
    assert mds.read(2) == sample(2, 50_000)


@pytest.mark.parametrize("cut", [1, 40_000, 160_000])
def test_a_file_that_ends_early_is_refused(cut: int) -> None:
    samples = [MdsFormat(COLUMNS, 2**20, []).encode(sample(number, 50_000)) for number in range(3)]
    parts, entry = MdsFormat(COLUMNS, 2**20, []).join(samples, "a.mds")
    with pytest.raises(DamagedShard, match=r"a\.mds: its header doesn't fit 3 samples in \d+ bytes"):
        open_mds(io.BytesIO(b"".join(parts)[:-cut]), entry)


@pytest.mark.parametrize("change", ["longer", "shorter", "swapped", "more samples"])
def test_a_header_that_does_not_fit_its_file_is_refused_before_any_sample(change: str) -> None:
    places = [24, 30, 40, 50]
    size = {"longer": 51, "shorter": 49}.get(change, 50)
    if change == "swapped":
        places[1], places[2] = places[2], places[1]
    header = struct.pack("<5I", 4 if change == "more samples" else 3, *places)

    def check(header: bytes, size: int) -> None:
        MdsFile(lambda count, at: header[at : at + count], size, "shard", 3, {"id": "str"}).check()

    with pytest.raises(DamagedShard, match=f"its header doesn't fit 3 samples in {size} bytes"):
        check(header, size)
    check(struct.pack("<5I", 3, 24, 30, 40, 50), 50)
