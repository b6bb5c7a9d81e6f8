"""Streaming's dataset with a guard: data that can't be read ends the run in one named error, within a bound of time.

As Streaming 0.13 is, a missing or damaged shard ends an epoch early with success, or lets workers wait for ever. Here

1. a set's index is compared with the remote's at the start, so a cache never outlives the data it came from;
2. each file's size and hash are checked before its first sample is read, also of files that lay in the cache;
3. a file that doesn't arrive is asked for again, with growing pauses, until `fault_timeout`;
4. the first failure is noted in shared memory, where the other processes of this machine find it;
5. an epoch that ends before its last sample is an error.

Some methods replace ones of Streaming and follow them closely; tests/stream/test_streaming_originals.py notices when
those change.
"""

from __future__ import annotations

import hashlib
import os
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from threading import Event, _register_atexit  # type: ignore[attr-defined]
from typing import IO, Any

import numpy as np
from filelock import FileLock
from streaming import StreamingDataset
from streaming.base.constant import TICK
from streaming.base.dataset import _Iterator, _ShardState

from composer_path.storage.errors import Stopped
from composer_path.stream.cache import INDEX, agree_on_failure, clear_left_overs, refresh_index, take_cache
from composer_path.stream.error import FailureNote, StreamError
from composer_path.stream.guarded_stream import FAULT_TIMEOUT, GuardedStream
from composer_path.stream.sample_reader import SampleReader
from composer_path.stream.shared_prefix import prefix_picked_once

DOWNLOAD_TIMEOUT = 60.0


class GuardedStreamingDataset(StreamingDataset):
    """A `StreamingDataset` that never loses a sample in silence.

    Args:
        local: Folder of the shards, or of their cache; or the shards' address, see `GuardedStream`.
        remote: Folder or address that they come from; None if they lie in `local`.
        streams: Several sets instead of one.
        split: Subfolder of both.
        fault_timeout: Seconds in which a file must have arrived, all attempts together.
        download_timeout: Seconds without a byte that end an attempt.
        validate_hash: This checksum must be in the index; by default the cheapest that is there is taken.
        keep_zip: Keep compressed shards beside the decompressed ones.
        **streaming: Keywords of `streaming.StreamingDataset`.

    Raises:
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
        split: str | None = None,
        fault_timeout: float = FAULT_TIMEOUT,
        download_timeout: float = DOWNLOAD_TIMEOUT,
        validate_hash: str | None = None,
        keep_zip: bool = False,
        **streaming: Any,
    ) -> None:
        if (local is None) == (not streams):
            raise ValueError("give either local (and remote), or streams")
        if local is not None:
            streams = [GuardedStream(local=local, remote=remote)]
        assert streams is not None
        self._cache_locks: list[IO[str]] = []
        defaults = {"split": split, "download_timeout": download_timeout, "validate_hash": validate_hash}
        defaults |= {"keep_zip": keep_zip, "download_retry": 0}
        for stream in streams:
            stream.fault_timeout = fault_timeout
            stream.apply_default(defaults)  # Streaming does so too, but we need them before
        leads = int(os.environ.get("LOCAL_RANK", 0)) == 0
        agree_on_failure(lambda: self._prepare_caches(streams) if leads else None)
        agree_on_failure(lambda: self._start(streams, defaults | streaming, leads))

    def _prepare_caches(self, streams: Sequence[GuardedStream]) -> None:
        cached = [stream for stream in streams if stream.remote is not None]
        self._cache_locks = [take_cache(folder) for folder in dict.fromkeys(stream.folder for stream in cached)]
        clear_left_overs([stream.folder for stream in cached])
        for stream in cached:
            refresh_index(stream)

    def _start(self, streams: Sequence[GuardedStream], streaming: dict[str, Any], leads: bool) -> None:
        try:
            with prefix_picked_once():
                super().__init__(streams=streams, **streaming)
        except ValueError as error:
            if not str(error).startswith("Reused local directory"):
                raise
            found = "two loaders of one run cache in the same folder"
            fix = "give each loader, and each stream, its own folder as local"
            raise StreamError.of("", "cache-in-use", str(streams[0].folder), found, fix) from None
        state = hashlib.sha256()
        for stream in streams:
            state.update((stream.folder / INDEX).read_bytes())
        self.data_hash = state.hexdigest()[:16]  # other data has another order of samples
        self._samples = SampleReader()
        self._starts: list[int] = self.sample_offset_per_shard.tolist()
        self._failure = FailureNote(f"{self._shm_prefix_int:06}_failure")
        if leads:
            self._failure.clear()
            # What lies in a cache is looked at before it is believed: `prepare_shard` does so for this state.
            self._shard_states[:] = np.uint8(_ShardState.REMOTE)

    def __getstate__(self) -> dict[str, Any]:
        """For workers that are started anew: locks stay with the first process."""
        return self.__dict__ | {"_cache_locks": []}

    def failure(self) -> StreamError | None:
        """The first failure of any process that reads this set on this machine."""
        return self._failure.read()

    def raise_failure(self) -> None:
        """Raise it, if there is one."""
        if self._stopped():
            # Not by a name: that would be a cycle through its traceback.
            raise self.failure() or StreamError("stopped")

    def _stopped(self) -> bool:
        return self._failure.is_set()

    def _note(self, error: BaseException, shard: str = "") -> StreamError:
        """Tell all processes; anything but a `StreamError` is one of ours gone wrong."""
        if isinstance(error, Stopped):
            return self.failure() or StreamError("stopped")
        if not isinstance(error, StreamError):
            found = f"{type(error).__name__}: {error}"
            error = StreamError.of(shard, "internal", self._where(), found, "please report this")
        self._failure.write(error)
        return error

    def _where(self) -> str:
        return ", ".join(stream.where for stream in self.streams)

    def prepare_shard(self, shard_id: int | np.integer, blocking: bool = True) -> None:
        """Have a shard on this machine, whole and checked; wait, if `blocking`, while another worker fetches it.

        Raises:
            StreamError: It can't be had.
        """
        started = time.monotonic()
        stream: GuardedStream = self.streams[self.stream_per_shard[shard_id]]
        shard = self.shards[shard_id]
        name = self._name_of(shard_id)
        if self._shard_states[shard_id] == _ShardState.LOCAL and (stream.folder / name).is_file():
            # Streaming asks before each sample; the lock would cost more than a small sample's reading.
            self._shard_access_times[shard_id] = np.uint64(time.time_ns())
            return
        while not self._claim(shard_id, name):
            if not blocking or self._shard_states[shard_id] == _ShardState.LOCAL:
                return
            self.raise_failure()
            self._check_patience(started, int(self.sample_offset_per_shard[shard_id]))
            time.sleep(TICK)
        try:
            stream.stopped = self._failure.is_set  # not a method of ours: a cycle would keep the cache's lock
            delta = stream.prepare_shard(shard)
        except BaseException as error:
            with FileLock(self._cache_filelock_path):
                self.cache_usage -= self._reserved(shard_id)
                self._shard_states[shard_id] = np.uint8(_ShardState.REMOTE)
            raise self._note(error, name) from (None if isinstance(error, StreamError | Stopped) else error)
        with FileLock(self._cache_filelock_path):
            self.cache_usage += delta - self._reserved(shard_id)
            self._shard_access_times[shard_id] = np.uint64(time.time_ns())
            self._shard_states[shard_id] = np.uint8(_ShardState.LOCAL)

    def _claim(self, shard_id: int | np.integer, name: str) -> bool:
        """Whether this process is now the one that prepares a shard."""
        with FileLock(self._cache_filelock_path):
            state = self._shard_states[shard_id]
            if state == _ShardState.PREPARING:
                return False
            stream: GuardedStream = self.streams[self.stream_per_shard[shard_id]]
            shard = self.shards[shard_id]
            if state == _ShardState.LOCAL:
                if (stream.folder / name).is_file():
                    self._shard_access_times[shard_id] = np.uint64(time.time_ns())
                    return False
                self.cache_usage -= shard.get_raw_size()  # somebody emptied the cache
            elif self.cache_limit and stream.remote is not None:
                while self.cache_limit < self.cache_usage + shard.get_max_size() and self._make_room(shard_id):
                    pass
            self.cache_usage += self._reserved(shard_id)
            self._shard_states[shard_id] = np.uint8(_ShardState.PREPARING)
            return True

    def _reserved(self, shard_id: int | np.integer) -> int:
        """Bytes that count as used while a shard is on its way, so that two at once don't take the same room."""
        cached = self.cache_limit and self.streams[self.stream_per_shard[shard_id]].remote is not None
        return self.shards[shard_id].get_max_size() if cached else 0

    def _make_room(self, wanted: int | np.integer) -> bool:
        """Remove the shard that was not read for the longest time, never one that has no remote."""
        states, times = self._shard_states.numpy(), self._shard_access_times.numpy()
        cached = np.array([stream.remote is not None for stream in self.streams])[self.stream_per_shard]
        evictable = np.flatnonzero(cached & (states == _ShardState.LOCAL))
        if len(evictable):
            self._evict_shard(evictable[np.argmin(times[evictable])])
            return True
        for shard_id in np.flatnonzero(cached & (states == _ShardState.REMOTE)):  # of an earlier run, not looked at yet
            if shard_id != wanted and (freed := self.shards[shard_id].evict()):
                self.cache_usage -= freed
                return True
        return False

    def _check_patience(self, started: float, sample_id: int) -> None:
        """A process that was killed while it fetched a shard would leave the others waiting for ever."""
        seconds = 2 * max(stream.fault_timeout for stream in self.streams) + 30
        if time.monotonic() - started > seconds and sample_id != -1:
            shard_id, _ = self.spanner[sample_id]
            stream = self.streams[self.stream_per_shard[shard_id]]
            fix = "look for a process that was killed, and start again"
            found = f"another process has been preparing it for {seconds:.0f} s"
            raise self._note(StreamError.of(self._name_of(shard_id), "stalled", stream.where, found, fix))

    def _name_of(self, shard_id: int | np.integer) -> str:
        return self.shards[shard_id].file_pairs[0][0].basename

    def get_item(self, sample_id: int | np.integer, retry: int = 7) -> Any:
        """A sample by its index; its shard is brought here and checked first."""
        shard_id, number = self._find(int(sample_id))
        if self._shard_states[shard_id] != _ShardState.LOCAL:
            self.prepare_shard(shard_id)
        try:
            event = getattr(self, "_event", None)
            record = None if event is not None and event.is_set() else self._samples.read(self.shards[shard_id], number)
            if record is None:  # Streaming brings a file that is gone, or raises what another thread met
                return super().get_item(int(sample_id), retry)
            self._shard_access_times[shard_id] = np.uint64(time.time_ns())
            return record
        except StreamError:
            raise
        except Exception as error:
            self.raise_failure()
            raise self._note(self._damage(shard_id, error)) from error

    def _find(self, sample_id: int) -> tuple[int, int]:
        """A sample's shard, and its number in it; Streaming's spanner compares every shard of a span of samples."""
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"samples go from 0 to {self.num_samples - 1:,}, found {sample_id:,}")
        shard_id = bisect_right(self._starts, sample_id) - 1
        return shard_id, sample_id - self._starts[shard_id]

    def _damage(self, shard_id: int | np.integer, error: Exception) -> StreamError:
        """What is wrong with a shard that was good when it was checked, or whose contents aren't samples."""
        stream: GuardedStream = self.streams[self.stream_per_shard[shard_id]]
        name = self._name_of(shard_id)
        try:
            good, _ = stream.look(self.shards[shard_id].file_pairs[0][0])
        except StreamError as damage:
            return damage
        found = f"a sample of it can't be read ({type(error).__name__})"
        if not good:
            found += ", as the file changed in the cache after its check; it was removed there"
            return StreamError.of(name, "changed", str(stream.folder), found, "find out what writes there; start again")
        return StreamError.of(name, "unreadable", stream.where, found, "convert the data again")

    def on_exception(self, future: Future) -> None:
        """A thread's failure stops the others; `__iter__` raises it."""
        error = future.exception()
        if error is not None:
            self._note(error)
            self._event.set()

    def _each_sample_id(self, it: _Iterator) -> Iterator[int]:
        """Streaming's loop, which also ends in the failure of any process, and when a shard never becomes ready."""
        waiting_since = looked = time.monotonic()
        while not it.should_exit() and it.yield_index < it.total:
            if it.ready_index <= it.yield_index:
                now = time.monotonic()
                if self._event.is_set() or now - looked > 0.1:
                    looked = now
                    self._stop_if_failed(it)
                    self._check_patience(waiting_since, int(it.sample_ids[it.yield_index]))
                time.sleep(TICK)
                continue
            if self._event.is_set():
                self._stop_if_failed(it)
            sample_id = it.sample_ids[it.yield_index]
            if sample_id != -1:
                yield int(sample_id)
            it.yield_index += 1
            waiting_since = time.monotonic()
        it.on_exit()

    def _stop_if_failed(self, it: _Iterator) -> None:
        if self._stopped():
            self._event.set()  # for this process's threads
            it.on_exit()
            self.raise_failure()

    def __iter__(self) -> Iterator[Any]:
        """All samples of this worker's share, or a `StreamError`."""
        self.raise_failure()
        self._event = Event()
        # Streaming's threads look at nothing else while they wait for a shard, and Python waits for them when it ends.
        _register_atexit(self._event.set)
        before = getattr(self, "_iterator", None)
        try:
            yield from super().__iter__()
        except StreamError:
            self._event.set()  # ends this process's threads
            raise
        except Exception as error:
            self._event.set()
            self.raise_failure()
            raise self._note(error) from error
        self.raise_failure()
        it = getattr(self, "_iterator", None)
        if it is not before and it is not None and it.yield_index < it.total:
            found = f"{it.yield_index:,} of this worker's {it.total:,} samples were read"
            raise self._note(StreamError.of("", "samples-missing", self._where(), found, "please report this"))

    def samples_to_come(self) -> int:
        """How many samples the next epoch, or the rest of a resumed one, must at least bring to this rank."""
        _, done = self._resume(self._parallel_rank_world, self.next_epoch)
        return max(0, self.epoch_size - done) // self._parallel_rank_world.num_ranks

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where to go on, and in which data."""
        return super().state_dict(num_samples, from_beginning) | {"data_hash": self.data_hash}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Go on there.

        Raises:
            StreamError: Amid an epoch of other data.
        """
        known = obj.get("data_hash")
        if known is not None and obj["sample_in_epoch"] and known != self.data_hash:
            found = f"sample {obj['sample_in_epoch']:,} of an epoch over other data is where the checkpoint stopped"
            fix = "give it that data again, or start from the weights alone (trainer.load_weights_only)"
            raise StreamError.of("", "data-changed", self._where(), found, fix)
        super().load_state_dict(obj)
