"""What this project takes for granted of Streaming's dataset: a bare one, without our code, says where it broke.

docs/seam.md says where each of these is used.
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import MDSWriter, Stream, StreamingDataset
from streaming.base.batching import batching_methods, generate_work
from streaming.base.compression import decompress
from streaming.base.constant import LOCALS, SHM_TO_CLEAN
from streaming.base.dataset import _ShardState
from streaming.base.hashing import get_hashes
from streaming.base.partition import algos as partition_algos
from streaming.base.shared import SharedArray, SharedMemory
from streaming.base.shared.prefix import _check_self, _get_path, _pack_locals, _unpack_locals
from streaming.base.shuffle import algos as shuffle_algos
from streaming.base.util import bytes_to_int, number_abbrev_to_int
from streaming.base.world import World
from torch.utils.data import DataLoader

NUM_SAMPLES, IN_A_SHARD, BATCH = 22, 4, 4
COLUMNS = {"id": "int", "data": "bytes", "notes": "json", "text": "str"}


def sample_of(number: int) -> dict[str, Any]:
    return {"id": number, "data": bytes([number]) * 300, "notes": {"n": number}, "text": f"é{number}"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards, of four samples and, at last, two."""
    folder = tmp_path_factory.mktemp("shards") / "set"
    with MDSWriter(out=str(folder), columns=COLUMNS, size_limit=1700, hashes=["xxh64"]) as writer:
        for number in range(NUM_SAMPLES):
            writer.write(sample_of(number))
    return folder


class Bare(StreamingDataset):
    """Notes what Streaming calls."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        self.prepared: list[tuple[int, bool, bool]] = []
        self.read: list[int] = []
        self.works: list[tuple[int, ...]] = []
        self.order: list[int] | None = None
        defaults = {"batch_size": BATCH, "num_canonical_nodes": 1, "shuffle_block_size": 1 << 18}
        super().__init__(*args, **defaults | keywords)

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        self.prepared.append((int(shard_id), blocking, threading.current_thread() is threading.main_thread()))
        super().prepare_shard(shard_id, blocking)

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        self.read.append(int(sample_id))
        return super().get_item(sample_id, retry)

    def _share_work(self, sample_ids: Any) -> Any:
        self.works.append(sample_ids.shape)
        if self.order is not None:
            sample_ids[:] = np.array(self.order).reshape(sample_ids.shape)
        return super()._share_work(sample_ids)


@pytest.fixture(scope="module")
def dataset(shards: Path) -> Bare:
    """A shuffled set over the folder itself."""
    return Bare(local=str(shards), shuffle=True, shuffle_seed=9)


def ids(samples: Any) -> list[int]:
    return [sample["id"] for sample in samples]


def left_over(dataset: Any, num_workers: int, state: dict[str, Any] | None = None) -> Iterator[list[int]]:
    """Batches of ids through a plain DataLoader."""
    if state is not None:
        dataset.load_state_dict(state)
    return iter(DataLoader(dataset, batch_size=BATCH, num_workers=num_workers, collate_fn=ids))


def dealt_out(dataset: Any, epoch: int) -> list[int]:
    """An epoch's order on one rank with one worker."""
    return generate_work("random", dataset, World(1, 1, 1, 0), epoch, 0).ravel()[:NUM_SAMPLES].tolist()


# --- shards ----------------------------------------------------------------------------------------------------------


def test_an_index_names_files_sizes_hashes_and_columns_in_order(shards: Path) -> None:
    index = json.loads((shards / "index.json").read_bytes())
    assert index["version"] == 2 and [shard["samples"] for shard in index["shards"]] == [4, 4, 4, 4, 4, 2]
    first = index["shards"][0]
    assert set(first) == {
        *("column_encodings", "column_names", "column_sizes", "compression", "format", "hashes", "raw_data"),
        *("samples", "size_limit", "version", "zip_data"),
    }
    assert first["column_names"] == sorted(COLUMNS) and first["format"] == "mds" and first["zip_data"] is None
    assert first["column_encodings"] == [COLUMNS[name] for name in first["column_names"]]
    assert first["raw_data"]["basename"] == "shard.00000.mds" and set(first["raw_data"]["hashes"]) == {"xxh64"}
    assert first["raw_data"]["bytes"] == (shards / "shard.00000.mds").stat().st_size


def test_a_shard_is_a_table_of_offsets_and_sizes_before_values(shards: Path) -> None:
    data = (shards / "shard.00000.mds").read_bytes()
    (count,) = struct.unpack_from("<I", data)
    offsets = struct.unpack_from(f"<{count + 1}I", data, 4)
    assert count == IN_A_SHARD and offsets[-1] == len(data)
    sample = data[offsets[1] : offsets[2]]
    sizes = struct.unpack_from("<3I", sample)  # data, notes, text; an int has its own
    assert sizes[0] == 300 and sample[12 : 12 + 300] == bytes([1]) * 300
    assert json.loads(sample[12 + 300 + 8 :][: sizes[1]]) == {"n": 1}


def test_values_come_back_as_they_were_and_bytes_untouched(dataset: Bare) -> None:
    assert [dataset[number] for number in (0, 5, 21)] == [sample_of(number) for number in (0, 5, 21)]


def test_a_reader_tells_files_sizes_and_columns(dataset: Bare, shards: Path) -> None:
    reader, path = dataset.shards[0], shards / "shard.00000.mds"
    ((raw, zipped),) = reader.file_pairs
    assert (raw.basename, raw.bytes, zipped) == (path.name, path.stat().st_size, None) and set(raw.hashes) == {"xxh64"}
    assert reader.samples == IN_A_SHARD and reader.raw_data is raw and reader.compression is None
    assert reader.get_raw_size() == reader.get_max_size() == path.stat().st_size
    assert list(reader.column_names) == sorted(COLUMNS) and [*reader.column_sizes] == [None, 8, None, None]
    assert (Path(reader.dirname), reader.split) == (shards, "")


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_has_all_samples_once_in_an_order_of_its_own_the_same_with_any_workers(
    shards: Path, num_workers: int
) -> None:
    again = Bare(local=str(shards), shuffle=True, shuffle_seed=9)
    epochs = [[number for batch in left_over(again, num_workers) for number in batch] for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(NUM_SAMPLES))] * 2
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    world = World(1, 1, 1, 0)
    assert epochs == [
        generate_work("random", again, world, epoch, 0).ravel()[:NUM_SAMPLES].tolist() for epoch in (0, 1)
    ]


def test_global_batches_are_the_same_for_any_number_of_ranks(shards: Path) -> None:
    one, two = (Bare(local=str(shards), shuffle=True, shuffle_seed=9, batch_size=size) for size in (4, 2))
    whole = generate_work("random", one, World(1, 1, 1, 0), 0, 0)
    halves = generate_work("random", two, World(1, 2, 1, 0), 0, 0)
    assert whole.shape == (1, 1, 1, 6, 4) and halves.shape == (1, 2, 1, 6, 2)
    for step in range(6):
        assert sorted(whole[0, 0, 0, step]) == sorted(halves[0, :, 0, step].ravel())
    assert (whole == -1).sum() == 2  # the last batch's empty slots


def test_ranks_that_do_not_divide_a_set_repeat_at_most_one_less_than_they_are(shards: Path) -> None:
    three = Bare(local=str(shards), shuffle=False, batch_size=2)
    dealt = generate_work("random", three, World(1, 3, 1, 0), 0, 0)
    counts = [(dealt[0, rank] >= 0).sum() for rank in range(3)]
    assert counts == [8, 8, 8] and set(dealt.ravel()) - {-1} == set(range(NUM_SAMPLES))


def test_workers_take_turns_and_what_is_shared_in_place_is_what_is_read(shards: Path) -> None:
    reordered = Bare(local=str(shards), shuffle=False, epoch_size=16)
    reordered.order = list(reversed(range(16)))
    assert [number for batch in left_over(reordered, 0) for number in batch] == reordered.order
    assert reordered.works == [(1, 1, 1, 4, BATCH)]  # nodes, ranks, workers, batches, batch size
    turns = generate_work("random", reordered, World(1, 1, 2, 0), 0, 0)
    batches = [turns[0, 0, step % 2, step // 2].tolist() for step in range(4)]
    straight = generate_work("random", reordered, World(1, 1, 1, 0), 0, 0)
    assert batches == straight[0, 0, 0].tolist()


def test_streams_have_shares_and_places_in_the_order_given(shards: Path, tmp_path: Path) -> None:
    other = tmp_path / "split"
    (other / "b").mkdir(parents=True)
    for path in shards.iterdir():
        (other / "b" / path.name).write_bytes(path.read_bytes())
    streams = [Stream(local=str(shards), repeat=0.5), Stream(local=str(other), split="b", repeat=2.0)]
    mixed = Bare(streams=streams, shuffle=False)
    assert mixed.samples_per_stream.tolist() == [NUM_SAMPLES] * 2 and mixed.num_samples == 2 * NUM_SAMPLES
    assert mixed.stream_per_shard.tolist() == [0] * 6 + [1] * 6
    assert mixed.sample_offset_per_shard.tolist() == [0, 4, 8, 12, 16, 20, 22, 26, 30, 34, 38, 42]
    assert mixed.epoch_size == NUM_SAMPLES // 2 + 2 * NUM_SAMPLES and mixed.streams[1].split == "b"
    assert mixed[NUM_SAMPLES + 3]["id"] == 3


def test_a_stream_takes_the_datasets_words_for_what_it_was_not_given(tmp_path: Path) -> None:
    stream = Stream(local=str(tmp_path), download_retry=5)
    stream.apply_default(
        {"remote": None, "local": None, "split": "s", "download_retry": 0, "download_timeout": 7.0}
        | {"validate_hash": "xxh64", "keep_zip": True}
    )
    assert (stream.split, stream.download_retry, stream.download_timeout) == ("s", 5, 7.0)
    assert stream.validate_hash == "xxh64" and stream.keep_zip and stream.safe_keep_zip and stream._keep_zip is None


def test_a_method_in_the_table_deals_out_an_epoch(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def deal(dataset: Any, world: World, epoch: int, sample_in_epoch: int) -> np.ndarray:
        asked.append((world.num_ranks, epoch, sample_in_epoch))
        return np.array([5, 3, -1, 4]).reshape(1, 1, 1, 1, BATCH)

    monkeypatch.setitem(batching_methods, "ours", deal)
    ours = Bare(local=str(shards))
    ours.batching_method = "ours"
    assert ids(ours) == [5, 3, 4] and asked == [(1, 0, 0)]
    assert ids(ours) == [5, 3, 4] and asked[1:] == [(1, 1, 0)]


@pytest.mark.parametrize("algorithm", sorted(shuffle_algos))
def test_every_shuffle_has_each_sample_once(algorithm: str) -> None:
    sizes = np.array([4, 1, 7, 3, 5])
    for nodes in range(1, 21):
        for block in (2, 9, 1 << 18):
            order = shuffle_algos[algorithm](sizes, nodes, 3, nodes, block)
            assert sorted(order.tolist()) == list(range(20)), (nodes, block)


@pytest.mark.parametrize(("share", "granularity"), [(5, 1), (22, 1), (30, 1), (30, 3), (55, 50)])
def test_a_streams_share_is_what_it_was_told_to_choose(shards: Path, share: int, granularity: int) -> None:
    dataset = Bare(local=str(shards), sampling_granularity=granularity)
    dataset.streams[0].choose = share
    units, samples = dataset.resample_streams(4)
    counts = np.bincount(samples, minlength=NUM_SAMPLES)
    assert len(samples) == sum(units) == share and counts.max() - counts.min() <= 1


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_state_amid_an_epoch_goes_on_there_in_a_new_process_with_other_workers(
    dataset: Bare, shards: Path, num_workers: int
) -> None:
    expected = dealt_out(dataset, dataset.next_epoch)
    batches = left_over(dataset, 0)
    read = [next(batches), next(batches)]
    state = dataset.state_dict(2 * BATCH, True)
    assert set(state) >= {"epoch", "sample_in_epoch", "num_canonical_nodes", "shuffle_seed", "initial_physical_nodes"}
    assert state["epoch"] == dataset.next_epoch - 1 and state["sample_in_epoch"] == 2 * BATCH
    other = Bare(local=str(shards), shuffle=True)  # its own seed is given up
    rest = list(left_over(other, num_workers, state | {"more": "is carried along"}))
    assert [number for batch in (*read, *rest) for number in batch] == expected
    assert other.next_epoch == state["epoch"] + 1


def test_a_loaded_state_says_how_far_the_epoch_is_before_anybody_reads(shards: Path) -> None:
    fresh = Bare(local=str(shards), shuffle=True, shuffle_seed=9)
    state = fresh.state_dict(0, True) | {"epoch": 3, "sample_in_epoch": 8}
    fresh.load_state_dict(state)
    assert fresh._resume(fresh._parallel_rank_world, fresh.next_epoch) == (3, 8)
    assert fresh._parallel_rank_world.num_ranks == 1


def test_an_epochs_end_is_still_told_as_the_finished_epoch(shards: Path) -> None:
    """The fault that `ConversationDataset.state_dict` mends: with it gone, the mend can go."""
    short = Bare(local=str(shards), shuffle=False)
    assert len(list(short)) == NUM_SAMPLES
    assert short.state_dict(0, True)["epoch"] == 0 and short.next_epoch == 1


# --- reading ---------------------------------------------------------------------------------------------------------


def test_iterating_reads_each_sample_by_get_item_and_a_thread_prepares_shards_ahead(shards: Path) -> None:
    short = Bare(local=str(shards), shuffle=False, predownload=1)
    reader = iter(short)
    for _ in range(IN_A_SHARD):
        next(reader)
    assert short.read == list(range(IN_A_SHARD))
    assert {shard for shard, _, _ in short.prepared} <= {0, 1}
    assert ids(reader) == list(range(IN_A_SHARD, NUM_SAMPLES)) and short.read == list(range(NUM_SAMPLES))
    assert {shard for shard, _, _ in short.prepared} == set(range(6))
    assert {(blocking, main) for _, blocking, main in short.prepared} == {(False, False)}


def test_a_missing_shard_still_ends_an_epoch_in_silence(shards: Path, tmp_path: Path) -> None:
    """The fault that `GuardedStreamingDataset` is there for."""
    for path in shards.iterdir():
        if path.name != "shard.00003.mds":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    cache = tmp_path / "cache"
    holed = Bare(local=str(cache), remote=str(tmp_path), shuffle=False, download_retry=1)
    found = ids(holed)
    assert found == list(range(len(found))) and len(found) <= 3 * IN_A_SHARD


def test_shards_are_fetched_from_a_remote_and_counted(shards: Path, tmp_path: Path) -> None:
    cached = Bare(local=str(tmp_path / "cache"), remote=str(shards), shuffle=False)
    assert cached._shard_states.numpy().tolist() == [_ShardState.REMOTE] * 6
    cached.prepare_shard(2)
    assert cached._shard_states.numpy().tolist() == [1, 1, _ShardState.LOCAL, 1, 1, 1]
    files, index = {path.name for path in (tmp_path / "cache").iterdir()}, (shards / "index.json").stat().st_size
    assert files == {"index.json", "shard.00002.mds"}
    assert cached.cache_usage == index + cached.shards[2].get_raw_size()
    cached._evict_shard(2)
    assert cached.cache_usage == index and cached._shard_states[2] == _ShardState.REMOTE


# --- shared memory ---------------------------------------------------------------------------------------------------


def test_shared_memory_is_named_by_a_number_and_says_which_folders_are_taken(dataset: Bare, shards: Path) -> None:
    number = dataset._shm_prefix_int
    assert _get_path(number, LOCALS) == f"{number:06}_locals" and LOCALS in SHM_TO_CLEAN
    memory = SharedMemory(_get_path(number, LOCALS), False, auto_cleanup=False)
    assert _unpack_locals(bytes(memory.buf)) == ([str(shards)], number)
    assert _unpack_locals(_pack_locals(["a", "b"], 7)) == (["a", "b"], 7)
    with pytest.raises(ValueError, match="Reused local directory"):
        _check_self(["a", "a"])
    values, same = (SharedArray(3, np.uint8, f"{number:06}_contract") for _ in range(2))
    values[1:] = 5
    assert same.numpy().tolist() == [0, 5, 5] and same[1] == 5


# --- words -----------------------------------------------------------------------------------------------------------


def test_words_that_a_yaml_may_say_are_known() -> None:
    assert {"random", "stratified", "per_stream", "device_per_stream"} <= set(batching_methods)
    assert {"py1e", "py1br", "py1s", "py2s", "naive"} <= set(shuffle_algos)
    assert {"relaxed", "orig"} <= set(partition_algos) and {"xxh64", "sha1"} <= set(get_hashes())
    assert (bytes_to_int("10mb"), number_abbrev_to_int("50k")) == (10 * 2**20, 50_000)


def test_what_was_compressed_comes_back(tmp_path: Path) -> None:
    with MDSWriter(out=str(tmp_path), columns={"id": "int"}, compression="zstd", hashes=["xxh64"]) as writer:
        writer.write({"id": 1})
    shard = json.loads((tmp_path / "index.json").read_bytes())["shards"][0]
    assert shard["compression"] == "zstd" and shard["zip_data"]["basename"] == "shard.00000.mds.zstd"
    data = decompress("zstd", (tmp_path / "shard.00000.mds.zstd").read_bytes())
    assert len(data) == shard["raw_data"]["bytes"]
