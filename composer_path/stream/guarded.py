"""Streaming's dataset with a guard: data that can't be read ends the run in one named error, within a bound of time.

As Streaming 0.13 is, a missing or damaged shard ends an epoch early with success, or lets workers wait for ever. Here

1. a set's index is compared with the remote's at the start, so a cache never outlives the data it came from;
2. each file's size and hash are checked before its first sample is read, also of files that lay in the cache;
3. a file that doesn't arrive is asked for again, with growing pauses, until `fault_timeout`;
4. the first failure is noted in shared memory, where the other processes of this machine find it;
5. an epoch that ends before its last sample is an error;
6. an epoch has each sample once (order.py), and a resumed run takes its place in the same data (resume.py).

Some methods replace ones of Streaming and follow them closely; tests/stream/test_streaming_originals.py notices when
those change.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from threading import Event, _register_atexit  # type: ignore[attr-defined]
from typing import IO, Any

import numpy as np
from filelock import FileLock
from streaming.base.constant import TICK
from streaming.base.dataset import _Iterator, _ShardState
from streaming.base.format import Reader

from composer_path.storage.errors import Stopped
from composer_path.stream.cache import clear_left_overs, refresh_index, take_cache
from composer_path.stream.error import FailureNote, StreamError, agree_on_failure
from composer_path.stream.guarded_stream import PATIENCE, GuardedStream
from composer_path.stream.open_shards import SampleReader
from composer_path.stream.order import (
    CHECKED,
    NOTHING,
    STAND_IN,
    check_setting,
    check_shares,
    repetition_of,
    sample_of,
)
from composer_path.stream.resume import OrderedStreamingDataset
from composer_path.stream.shared_prefix import prefix_picked_once

_REMOTE, _PREPARING, _LOCAL = (
    np.uint8(state) for state in (_ShardState.REMOTE, _ShardState.PREPARING, _ShardState.LOCAL)
)


class GuardedStreamingDataset(OrderedStreamingDataset):
    """A `StreamingDataset` that never loses a sample in silence.

    Args:
        local: Folder of the shards, or of their cache; or the shards' address, see `GuardedStream`.
        remote: Folder or address that they come from; None if they lie in `local`.
        streams: Several sets instead of one.
        fault_timeout: Seconds in which a file must have arrived, all attempts together.
        drop_last: Leave out what doesn't fill an epoch's last global batch.
        **streaming: Keywords of `streaming.StreamingDataset`. `download_timeout` are seconds without a byte that end an
            attempt; without `validate_hash` the cheapest checksum that is in the index is taken. `num_canonical_nodes`
            left out are the nodes at the run's start, at most as many as an epoch has samples; kept on resume.

    Raises:
        ValueError: A setting would repeat samples or leave some out, or leaves an epoch without a step.
        StreamError: The data can't be read; on all ranks, whichever met it.
    """

    streams: Sequence[GuardedStream]
    cache_limit: int | None

    def __init__(
        self,
        *,
        local: str | None = None,
        remote: str | None = None,
        streams: Sequence[GuardedStream] | None = None,
        fault_timeout: float = PATIENCE,
        drop_last: bool = False,
        **streaming: Any,
    ) -> None:
        for name in CHECKED:
            try:
                check_setting(name, streaming.get(name))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        if (local is None) == (not streams):
            raise ValueError("give either local (and remote), or streams")
        streams = streams or [GuardedStream(local=str(local), remote=remote)]
        check_shares([stream.share for stream in streams], streaming.get("epoch_size"))
        self.drop_last, self.asked_epoch_size = drop_last, streaming.get("epoch_size")
        self._needs_stand_in = False
        self._cache_locks: list[IO[str]] = []
        defaults = {"split": None, "download_timeout": 60.0, "validate_hash": None, "keep_zip": False, **streaming}
        defaults["download_retry"] = 0  # we count, and wait, ourselves
        for stream in streams:
            stream.fault_timeout = fault_timeout
            stream.apply_default(defaults)  # Streaming does so too, but we need them before
        leads = int(os.environ.get("LOCAL_RANK", 0)) == 0
        agree_on_failure(lambda: self._prepare_caches(streams) if leads else None)
        agree_on_failure(lambda: self._start(streams, defaults, leads))

    def _prepare_caches(self, streams: Sequence[GuardedStream]) -> None:
        cached = [stream for stream in streams if stream.remote is not None]
        self._cache_locks = [take_cache(folder) for folder in dict.fromkeys(stream.folder for stream in cached)]
        clear_left_overs([stream.folder for stream in cached])
        for stream in cached:
            refresh_index(stream)

    def _start(self, streams: Sequence[GuardedStream], streaming: dict[str, Any], leads: bool) -> None:
        with prefix_picked_once():
            super().__init__(streams=streams, **streaming)
        self.settle_order()
        self.remember_data()
        self._samples = SampleReader()
        self._starts: list[int] = self.sample_offset_per_shard.tolist()
        self._failure = FailureNote(f"{self._shm_prefix_int:06}_failure")
        if leads:
            self._failure.clear()
            # What lies in a cache is looked at before it is believed: `prepare_shard` does so for this state.
            self._shard_states[:] = _REMOTE

    def __getstate__(self) -> dict[str, Any]:
        """For workers that are started anew: locks stay with the first process."""
        return self.__dict__ | {"_cache_locks": []}

    def failure(self) -> StreamError | None:
        """The first failure of any process that reads this set on this machine."""
        return self._failure.read()

    def raise_failure(self) -> None:
        """Raise it, if there is one."""
        if self._failure.is_set():
            # Not by a name: that would be a cycle through its traceback.
            raise self.failure() or StreamError("stopped")

    def note(self, error: BaseException, shard: str = "") -> StreamError:
        """Tell all processes; anything but a `StreamError` is one of ours gone wrong."""
        if isinstance(error, Stopped):
            return self.failure() or StreamError("stopped")
        if not isinstance(error, StreamError):
            found = f"{type(error).__name__}: {error}"
            error = StreamError.of(shard, "internal", self.where(), found, "please report this")
        self._failure.write(error)
        return error

    def prepare_shard(self, shard_id: int | np.integer, blocking: bool = True) -> None:
        """Have a shard on this machine, whole and checked, or raise `StreamError`.

        While another worker fetches it this one waits, if `blocking`, or returns.
        """
        if self._is_here(shard_id):  # the lock costs more than reading a sample
            return
        started = time.monotonic()
        while not self._claim(shard_id):
            if not blocking or self._shard_states[shard_id] == _LOCAL:
                return
            self.raise_failure()
            self._check_patience(started, shard_id)
            time.sleep(TICK)
        stream, shard, name = self._shard(shard_id)
        delta, state = 0, _REMOTE
        try:
            stream.stopped = self._failure.is_set  # not a method of ours: a cycle would keep the cache's lock
            delta, state = stream.prepare_shard(shard), _LOCAL
        except BaseException as error:
            raise self.note(error, name) from (None if isinstance(error, StreamError | Stopped) else error)
        finally:
            with FileLock(self._cache_filelock_path):
                self.cache_usage += delta - self._reserved(shard_id)
                self._shard_access_times[shard_id] = np.uint64(time.time_ns())
                self._shard_states[shard_id] = state

    def _shard(self, shard_id: int | np.integer) -> tuple[GuardedStream, Reader, str]:
        """A shard's stream, the shard, and its file's name."""
        shard = self.shards[shard_id]
        return self.streams[self.stream_per_shard[shard_id]], shard, shard.file_pairs[0][0].basename

    def _is_here(self, shard_id: int | np.integer) -> bool:
        """Whether a shard was checked and is still there; it is wanted now, so it won't be the first to make room."""
        stream, _, name = self._shard(shard_id)
        if self._shard_states[shard_id] != _LOCAL or not (stream.folder / name).is_file():
            return False
        self._shard_access_times[shard_id] = np.uint64(time.time_ns())
        return True

    def _claim(self, shard_id: int | np.integer) -> bool:
        """Whether this process is now the one that prepares a shard."""
        with FileLock(self._cache_filelock_path):
            state = self._shard_states[shard_id]
            if state == _PREPARING or self._is_here(shard_id):
                return False
            stream, shard, _ = self._shard(shard_id)
            if state == _LOCAL:
                self.cache_usage -= shard.get_raw_size()  # somebody emptied the cache
            elif self.cache_limit and stream.remote is not None:
                while self.cache_limit < self.cache_usage + shard.get_max_size() and self._make_room(shard_id):
                    pass
            self.cache_usage += self._reserved(shard_id)
            self._shard_states[shard_id] = _PREPARING
            return True

    def _reserved(self, shard_id: int | np.integer) -> int:
        """Bytes that count as used while a shard is on its way, so that two at once don't take the same room."""
        stream, shard, _ = self._shard(shard_id)
        return shard.get_max_size() if self.cache_limit and stream.remote is not None else 0

    def _make_room(self, wanted: int | np.integer) -> bool:
        """Remove the shard that was not read for the longest time, never one that has no remote."""
        states, times = self._shard_states.numpy(), self._shard_access_times.numpy()
        cached = np.array([stream.remote is not None for stream in self.streams])[self.stream_per_shard]
        evictable = np.flatnonzero(cached & (states == _LOCAL))
        if len(evictable):
            self._evict_shard(evictable[np.argmin(times[evictable])])
            return True
        for shard_id in np.flatnonzero(cached & (states == _REMOTE)):  # of an earlier run, not looked at yet
            if shard_id != wanted and (freed := self.shards[shard_id].evict()):
                self.cache_usage -= freed
                return True
        return False

    def _check_patience(self, started: float, shard_id: int | np.integer) -> None:
        """A process that was killed while it fetched a shard would leave the others waiting for ever."""
        seconds = 2 * max(stream.fault_timeout for stream in self.streams) + 30
        if time.monotonic() - started > seconds:
            stream, _, name = self._shard(shard_id)
            found = f"another process has been preparing it for {seconds:.0f} s"
            fix = "look for a process that was killed, and start again"
            raise self.note(StreamError.of(name, "stalled", stream.where, found, fix))

    def get_item(self, sample_id: int | np.integer, retry: int = 7) -> Any:
        """A sample by its index; its shard is brought here and checked first."""
        shard_id, number = self._find(int(sample_id))
        if self._shard_states[shard_id] != _LOCAL:
            self.prepare_shard(shard_id)
        try:
            stops = hasattr(self, "_event") and self._event.is_set()
            record = None if stops else self._samples.read(self.shards[shard_id], number)
            if record is None:  # Streaming brings a file that is gone, or raises what another thread met
                return super().get_item(int(sample_id), retry)
            if self.cache_limit:  # otherwise nothing makes room
                self._shard_access_times[shard_id] = np.uint64(time.time_ns())
            return record
        except StreamError:
            raise
        except Exception as error:
            self.raise_failure()
            raise self.note(self._damage(shard_id, error)) from error

    def _find(self, sample_id: int) -> tuple[int, int]:
        """A sample's shard, and its number in it; Streaming's spanner compares every shard of a span of samples."""
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"samples go from 0 to {self.num_samples - 1:,}, found {sample_id:,}")
        shard_id = bisect_right(self._starts, sample_id) - 1
        return shard_id, sample_id - self._starts[shard_id]

    def _damage(self, shard_id: int | np.integer, error: Exception) -> StreamError:
        """What is wrong with a shard that was good when it was checked, or whose contents aren't samples."""
        stream, shard, name = self._shard(shard_id)
        found = f"a sample of it can't be read ({type(error).__name__})"
        try:
            whole = stream.is_whole(shard.file_pairs[0][0])
        except StreamError as damage:
            return damage
        if not whole:
            found += ", as the file changed in the cache after its check; it was removed there"
            return StreamError.of(name, "changed", str(stream.folder), found, "find out what writes there; start again")
        return StreamError.of(name, "unreadable", stream.where, found, "convert the data again")

    def on_exception(self, future: Future) -> None:
        """A thread's failure stops the others; `__iter__` raises it."""
        if (error := future.exception()) is not None:
            self.note(error)
            self._event.set()

    def _each_sample_id(self, it: _Iterator) -> Iterator[int]:
        """This worker's samples in their order; `get_item` waits for the shard of each, and raises any failure."""
        while not it.should_exit() and it.yield_index < it.total:
            if (sample_id := int(it.sample_ids[it.yield_index])) != NOTHING:
                yield sample_id
            it.yield_index += 1
        it.on_exit()

    def _prepare_thread(self, it: _Iterator) -> None:
        """Have shards here ahead of the samples that are yielded; each once for all its samples that are near."""
        shard_ids = np.searchsorted(self.sample_offset_per_shard, it.sample_ids, side="right") - 1  # -1: no sample
        try:
            while it.prepare_index < it.total:
                end = it.total if self.predownload is None else min(it.yield_index + self.predownload + 1, it.total)
                for shard_id in dict.fromkeys(shard_ids[it.prepare_index : end].tolist()):
                    if it.should_exit() or self._event.is_set():
                        return
                    if shard_id >= 0:
                        self.prepare_shard(shard_id, blocking=False)
                it.prepare_index = max(end, it.prepare_index)
                if it.prepare_index < it.total and (self._event.wait(TICK) or it.should_exit()):
                    return
        finally:
            it.on_exit()

    def _ready_thread(self, it: _Iterator) -> None:
        """Nothing: a sample's shard is waited for where the sample is read."""
        it.on_exit()

    def _get_work(self, epoch: int, sample_in_epoch: int) -> Any:
        """This worker's share of an epoch, without the slot of a stand-in, which has no shard to prepare."""
        entries = super()._get_work(epoch, sample_in_epoch)
        ids, self._repetitions = sample_of(entries), repetition_of(entries)
        self._needs_stand_in = STAND_IN in ids
        ids[ids == STAND_IN] = NOTHING
        return ids

    def repetition(self) -> int:
        """How often the epoch had the sample before that this worker is reading; 0 where nothing is iterated."""
        it = getattr(self, "_iterator", None)
        return 0 if it is None or it.yield_index >= it.total else int(self._repetitions[it.yield_index])

    def stand_in(self) -> Any:
        """What a rank without a sample for the last slot that others have puts there; None: nothing."""
        return None

    def __iter__(self) -> Iterator[Any]:
        """All samples of this worker's share, or a `StreamError`."""
        self.raise_failure()
        self._event = Event()
        # Streaming's threads look at nothing else while they wait for a shard, and Python waits for them when it ends.
        _register_atexit(self._event.set)
        before = getattr(self, "_iterator", None)
        try:
            yield from super().__iter__()
        except Exception as error:
            self._event.set()  # ends this process's threads
            if isinstance(error, StreamError):
                raise
            self.raise_failure()
            raise self.note(error) from error
        self.raise_failure()
        it = getattr(self, "_iterator", None)
        if it is not before and it is not None and it.yield_index < it.total:
            found = f"{it.yield_index:,} of this worker's {it.total:,} samples were read"
            raise self.note(StreamError.of("", "samples-missing", self.where(), found, "please report this"))
        if self._needs_stand_in and (sample := self.stand_in()) is not None:
            yield sample
