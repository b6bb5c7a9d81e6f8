"""Claims about shared memory that is used again: never while anybody can read what is in it, and else always."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
from tiny_samples import assert_equal, make_sample
from torch import Tensor
from torch.utils.data import DataLoader

from composer_path.batches import memory_ring
from composer_path.batches.batch import Batch, PackedCollator
from composer_path.batches.memory_ring import MemoryRing, forget_ended_workers

SAMPLES = [make_sample(index, 3, 2, images=1) for index in range(48)]


@pytest.fixture(autouse=True)
def nothing_received() -> Iterator[None]:
    memory_ring._forget()
    yield
    memory_ring._forget()


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> MemoryRing:
    """This process's own; it is sender and receiver in one here."""
    ring = MemoryRing()
    monkeypatch.setattr(memory_ring, "_ring", ring)
    return ring


def loader_of(**settings: Any) -> DataLoader:
    return DataLoader(SAMPLES, batch_size=2, num_workers=2, collate_fn=PackedCollator(), **settings)  # type: ignore[arg-type]


def expected(number: int) -> Batch:
    return PackedCollator()(SAMPLES[2 * number : 2 * number + 2])


def filled(ring: MemoryRing, value: int, size: int = 5000) -> Tensor:
    return ring.take(size).fill_(value)


def sent(tensor: Tensor) -> Tensor:
    """What arrives."""
    return pickle.loads(ForkingPickler.dumps(memory_ring.piece_of(tensor)))


def num_received() -> int:
    return sum(map(len, memory_ring._received.values()))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_kept_batches_stay_and_memory_of_others_is_used_again(start: str) -> None:
    loader, kept = loader_of(multiprocessing_context=start, persistent_workers=True), {}
    for epoch in range(2):
        for number, batch in enumerate(loader):
            assert_equal(batch, expected(number))
            if number % 8 == epoch:
                kept[epoch, number] = batch
    # Two workers with two batches ahead, the one in hand, one being made, and three kept for each epoch.
    assert len(kept) == 6 and num_received() <= 2 * (2 + 2) + len(kept)
    for (_, number), batch in kept.items():
        assert_equal(batch, expected(number))


def test_a_view_alone_keeps_its_batch() -> None:
    loader = loader_of(persistent_workers=True)
    rows = [batch.pixel_values[1, 0].numpy()[None] for batch in loader]
    assert [row.flat[0] for row in rows] == [expected(n).pixel_values[1, 0, 0, 0] for n in range(24)]
    for _ in loader:
        pass
    assert [row.flat[0] for row in rows] == [expected(n).pixel_values[1, 0, 0, 0] for n in range(24)]


def test_an_epoch_that_is_left_early_gives_its_memory_back() -> None:
    loader = loader_of(persistent_workers=True)
    for _ in range(6):
        for number, batch in enumerate(loader):
            assert_equal(batch, expected(number))
            if number == 3:
                break
    assert num_received() <= 2 * (2 + 3)


def test_batches_outlive_a_killed_worker_and_its_other_memory_is_given_back() -> None:
    loader = loader_of(persistent_workers=True)
    batches = iter(loader)
    kept = [next(batches) for _ in range(3)]
    workers = loader._iterator._workers  # type: ignore[union-attr]
    # torch raises where a worker's end is noticed, for each of them: the second time it may be anywhere.
    raising = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
        # A connection that was just being made breaks off.
        ended = r"killed by signal|exited unexpectedly|reset by peer|^$"
        with pytest.raises((RuntimeError, ConnectionError, EOFError), match=ended):
            for _ in range(24):
                next(batches)
        for worker in workers:
            worker.join()
    finally:
        signal.signal(signal.SIGCHLD, raising)
    forget_ended_workers()
    assert not memory_ring._received
    for number, batch in enumerate(kept):
        assert_equal(batch, expected(number))


def test_memory_of_workers_that_ended_with_their_epoch_is_given_back() -> None:
    for _ in range(2):
        for number, batch in enumerate(loader_of()):
            assert_equal(batch, expected(number))
        forget_ended_workers()
        assert not memory_ring._received


def test_a_piece_is_written_again_only_when_both_sides_are_through(ring: MemoryRing) -> None:
    first = filled(ring, 1)
    arrived = sent(first)
    assert arrived.data_ptr() != first.data_ptr()
    filled(ring, 2)
    assert set(arrived.tolist()) == {1} and len(ring.pieces) == 2
    del arrived  # the sender still has it
    filled(ring, 3)
    assert set(first.tolist()) == {1}
    del first
    third, fourth = filled(ring, 4), filled(ring, 5)
    assert len(ring.pieces) == 2 and set(third.tolist()) == {4} and set(fourth.tolist()) == {5}


def test_a_piece_that_was_never_sent_is_used_again(ring: MemoryRing) -> None:
    addresses = {filled(ring, value).data_ptr() for value in range(5)}
    assert len(addresses) == 1


def test_larger_batches_replace_small_pieces_and_idle_ones_are_given_back(ring: MemoryRing) -> None:
    many = [filled(ring, value) for value in range(6)]
    assert len(ring.pieces) == 6
    del many
    assert len(filled(ring, 1, 50_000)) >= 50_000 and len(ring.pieces) == 1
    many = [filled(ring, value) for value in range(6)]
    del many
    for value in range(40):
        filled(ring, value)
    assert len(ring.pieces) == 1


def test_who_keeps_very_many_batches_gets_fresh_memory(ring: MemoryRing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_ring, "_MAX_PIECES", 3)
    arrived = [sent(filled(ring, value)) for value in range(8)]
    assert len(ring.pieces) <= 3
    assert [set(tensor.tolist()) for tensor in arrived] == [{value} for value in range(8)]


def test_a_second_receiver_and_a_file_get_a_copy(ring: MemoryRing) -> None:
    tensor = filled(ring, 7)
    first, second = sent(tensor), sent(tensor)
    written = pickle.loads(pickle.dumps(memory_ring.piece_of(tensor)))
    del tensor, first
    filled(ring, 8)
    assert set(second.tolist()) == set(written.tolist()) == {7}


def test_a_forked_process_keeps_what_its_parent_had(ring: MemoryRing) -> None:
    arrived = sent(filled(ring, 1))
    told, tell = os.pipe()
    if (child := os.fork()) == 0:
        os.read(told, 1)
        os._exit(0 if set(arrived.tolist()) == {1} else 1)
    del arrived
    for value in range(2, 6):
        filled(ring, value)
    os.write(tell, b".")
    assert os.waitpid(child, 0)[1] == 0


def test_a_child_that_ends_gives_nothing_of_its_parent_free(ring: MemoryRing) -> None:
    arrived = sent(filled(ring, 1))
    if (child := os.fork()) == 0:
        del arrived
        os._exit(0)
    os.waitpid(child, 0)
    for value in range(2, 6):
        filled(ring, value)
    assert set(arrived.tolist()) == {1}


def memory_files() -> set[int]:
    """The files in memory that this process holds open; what earlier tests left may be closed at any moment."""
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own
            if os.readlink(path).startswith("/memfd:"):
                found.add(path.stat().st_ino)
    return found


def test_memory_that_runs_out_is_an_error(ring: MemoryRing, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = memory_files()
    with pytest.raises(OSError, match="No space left"):
        ring.take(100)
    assert not ring.pieces and memory_files() <= before


def test_files_of_pieces_are_closed_with_them(ring: MemoryRing) -> None:
    sent(filled(ring, 0))  # starts what hands files over
    ring.pieces.clear()
    memory_ring._received.clear()
    before = memory_files()
    kept = [sent(filled(ring, value)) for value in range(4)]
    ring.take(10**6)
    assert len(kept) == 4 and len(memory_files() - before) >= 5
    kept.clear()
    ring.pieces.clear()
    memory_ring._received.clear()
    assert memory_files() <= before
