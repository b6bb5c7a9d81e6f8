"""Claims about reading single samples: Streaming's values, the file that lies there now, damage in a named error."""

from __future__ import annotations

import hashlib
import inspect
import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import MDSWriter
from streaming.base.format.mds import encodings
from streaming.base.format.mds.reader import MDSReader
from tiny_shards import write_set

from composer_path.shards.mds import DamagedShard
from composer_path.stream import open_shards
from composer_path.stream.error import StreamError
from composer_path.stream.guarded import GuardedStreamingDataset
from composer_path.stream.open_shards import SampleReader

COLUMNS = {"id": "str", "conversation": "json", "images": "bytes", "metadata": "json"}
NUM_SAMPLES = 12


def sample_of(number: int) -> dict[str, Any]:
    """Texts and images shorter and longer than what is read at first, and empty ones."""
    text = "é" * (number * 700)
    return {"id": f"ü{number}", "conversation": [text, None], "images": b"\0x" * number**4, "metadata": {"n": number}}


def write_samples(folder: Path, **keywords: Any) -> Path:
    settings: dict[str, Any] = {"size_limit": 40_000, "hashes": ["xxh64"]} | keywords
    with MDSWriter(out=str(folder), columns=COLUMNS, **settings) as writer:
        for number in range(NUM_SAMPLES):
            writer.write(sample_of(number))
    return folder


def open_set(**keywords: Any) -> GuardedStreamingDataset:
    return GuardedStreamingDataset(batch_size=1, num_canonical_nodes=1, shuffle=False, fault_timeout=8.0, **keywords)


def test_the_reader_follows_streamings_format_as_it_is_now() -> None:
    # As of mosaicml-streaming 0.13.0. When one differs, compare it with mds.py, then write the new number.
    originals = {
        MDSReader.get_sample_data: "bf25f29c874296ed",
        MDSReader.decode_sample: "ae0a8fff0220da96",
        encodings.JSON.decode: "8429203218d58bf8",
        encodings.Str.decode: "da515f3e45605ca0",
        encodings.Bytes.decode: "7eb3f80ed8d617e5",
    }
    found = {function: hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16] for function in originals}
    assert found == originals


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_samples_are_streamings_value_for_value(tmp_path: Path, compression: str | None) -> None:
    dataset = open_set(local=str(write_samples(tmp_path / "set", compression=compression)))
    assert len(dataset.shards) > 2
    whole = [dataset[index] for index in range(NUM_SAMPLES)]
    assert whole == [sample_of(number) for number in range(NUM_SAMPLES)]
    reader = SampleReader()
    for shard in dataset.shards:
        for number in range(shard.samples):
            found, expected = reader.read(shard, number), shard.get_item(number)
            assert found == expected
            assert found is not None
            assert list(found) == list(expected)
            assert {name: type(value) for name, value in found.items()} == {
                name: type(value) for name, value in expected.items()
            }


def test_a_set_of_other_columns_is_left_to_streaming(tmp_path: Path) -> None:
    dataset = open_set(local=str(write_set(tmp_path / "set")))  # has a column of numbers
    assert SampleReader().read(dataset.shards[0], 0) is None
    assert [dataset[index]["id"] for index in (0, 39)] == [0, 39]


def test_positions_outside_of_a_set_are_refused(tmp_path: Path) -> None:
    dataset = open_set(local=str(write_samples(tmp_path / "set")))
    assert dataset[-1] == sample_of(NUM_SAMPLES - 1)
    with pytest.raises(IndexError, match=f"go from 0 to {NUM_SAMPLES - 1}, found {NUM_SAMPLES}"):
        dataset.get_item(NUM_SAMPLES)


def test_a_shard_that_left_the_cache_and_came_again_is_read_anew(tmp_path: Path) -> None:
    remote, cache = write_samples(tmp_path / "remote"), tmp_path / "cache"
    dataset = open_set(remote=str(remote), local=str(cache))
    assert dataset[0] == sample_of(0)
    path = cache / dataset.shards[0].raw_data.basename
    opened = dataset._samples._open[id(dataset.shards[0])]
    assert opened is not None
    dataset.evict_shard(0)
    assert not path.exists()
    assert dataset[0] == sample_of(0)
    assert path.exists()
    assert dataset._samples._open[id(dataset.shards[0])] is not opened


def test_files_that_left_the_cache_are_let_go_with_the_next_shard(tmp_path: Path) -> None:
    dataset = open_set(remote=str(write_samples(tmp_path / "remote")), local=str(tmp_path / "cache"))
    numbers = dataset.sample_offset_per_shard.tolist()
    dataset[numbers[0]]
    dataset.evict_shard(0)
    dataset[numbers[1]]
    removed = [name for name in map(os.readlink, _descriptors()) if name.endswith("(deleted)") and ".mds" in name]
    assert removed == []


def _descriptors() -> list[str]:
    return [path for path in (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")) if os.path.islink(path)]


def test_few_files_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_shards, "_MAX_OPEN", 2)
    dataset = open_set(local=str(write_samples(tmp_path / "set")))
    assert len(dataset.shards) > 3
    for _ in range(2):
        assert [dataset[index] for index in range(NUM_SAMPLES)] == [sample_of(n) for n in range(NUM_SAMPLES)]
    mine = [name for name in map(os.readlink, _descriptors()) if name.startswith(str(tmp_path))]
    assert len([name for name in mine if name.endswith(".mds")]) == 2


@pytest.mark.parametrize("kind", ["cut", "offset", "sizes"])
def test_a_shard_that_is_damaged_after_its_check_ends_in_a_named_error(tmp_path: Path, kind: str) -> None:
    dataset = open_set(local=str(write_samples(tmp_path / "set")))
    last = dataset.shards[0].samples - 1
    assert dataset[last] == sample_of(last)
    path = tmp_path / "set" / dataset.shards[0].raw_data.basename
    data = bytearray(path.read_bytes())
    if kind == "cut":
        data = data[:-10]
    elif kind == "offset":
        data[4 * (last + 2) : 4 * (last + 3)] = np.uint32(2**31).tobytes()
    else:
        begin = int(np.frombuffer(data, np.uint32, 1, 4 * (last + 1))[0])
        data[begin : begin + 4] = np.uint32(5).tobytes()
    path.write_bytes(data)
    found = f"sample {last} of it doesn't fit its shard" if kind == "sizes" else "its header doesn't fit"
    with pytest.raises(DamagedShard, match=found):
        SampleReader().read(dataset.shards[0], last)
    with pytest.raises(StreamError) as caught:
        dataset[last]
    assert caught.value.shard == path.name
    assert caught.value.rule in ("hash", "size")


def test_an_error_never_repeats_the_text(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    with MDSWriter(out=str(folder), columns={"text": "bytes"}, hashes=[]) as writer:
        writer.write({"text": b"Miller-Jane"})
    index = folder / "index.json"
    index.write_text(index.read_text().replace('"column_encodings": ["bytes"]', '"column_encodings": ["json"]'))
    with pytest.raises(StreamError, match="can't be read") as caught:
        open_set(local=str(folder))[0]
    assert "Miller" not in str(caught.value)


def test_another_process_opens_its_own_files_or_shares_forked_ones(tmp_path: Path) -> None:
    dataset = open_set(local=str(write_samples(tmp_path / "set")))
    reader, shard = SampleReader(), dataset.shards[0]
    first = reader.read(shard, 0)
    assert pickle.loads(pickle.dumps(reader))._open == {}
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=lambda: send.send(_many(reader, shard)))
    child.start()
    mine = _many(reader, shard)
    theirs = receive.recv()
    child.join()
    assert mine == theirs == [first, reader.read(shard, 1)] * 200


def _many(reader: SampleReader, shard: Any) -> list[Any]:
    return [reader.read(shard, number) for _ in range(200) for number in (0, 1)]
