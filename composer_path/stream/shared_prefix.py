"""The number under which a dataset's shared memory stands, picked by one process for all of a machine.

Streaming 0.13 lets each rank look for the first free number by itself and creates the memory later. Two runs that start
at the same moment then take the same one (FileExistsError), as does a run beside the remains of one that ended half
way; and ranks that looked at different moments disagree, of which the others learn when their barrier times out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import gettempdir

import streaming.base.dataset
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS, SHM_TO_CLEAN
from streaming.base.shared import SharedMemory
from streaming.base.shared.prefix import _check_and_find_retrying, _check_self, _get_path, _pack_locals
from streaming.base.world import World

from composer_path.stream.error import StreamError, of_all_ranks
from composer_path.stream.shared_owner import MEMORY, SharedOwner, remove_left_overs


class _OwnedMemory(SharedMemory):
    """The memory that comes with a number, which is free when it goes: at exit it is the last of them."""

    owner: SharedOwner | None = None

    def cleanup(self) -> None:
        """Remove it."""
        super().cleanup()
        owner, self.owner = self.owner, None
        if owner is not None:
            owner.give_back()


@contextmanager
def prefix_picked_once() -> Iterator[None]:
    """Within it, a `StreamingDataset` takes its number from `register_prefix`."""
    original = streaming.base.dataset.get_shm_prefix
    streaming.base.dataset.get_shm_prefix = register_prefix
    try:
        yield
    finally:
        streaming.base.dataset.get_shm_prefix = original


def register_prefix(
    streams_local: Sequence[str], streams_remote: Sequence[str | None], world: World, retry: int = 100
) -> tuple[int, SharedMemory]:
    """Take a number on each machine, and tell its ranks; in place of Streaming's `get_shm_prefix`.

    What killed runs have left under theirs is removed before.
    As long as the memory that comes with it is there, which holds the folders, the number is taken. All ranks raise
    `StreamError` if another dataset of this machine caches in one of the folders, OSError if there can't be memory.
    """
    number, memory = -1, None
    failure: Exception | None = None
    if world.is_local_leader:
        try:
            _check_self(list(streams_local))
            remove_left_overs()
            number, memory = _take_number(list(streams_local), list(streams_remote), retry)
        except (ValueError, OSError) as error:
            failure = error
            if str(error).startswith("Reused local directory"):
                found = "two loaders of one run cache in the same folder"
                fix = "give each loader, and each stream, its own folder as local"
                failure = StreamError.of("", "cache-in-use", streams_local[0], found, fix)
    told = of_all_ranks((world.node, number, failure))
    for _, _, met in told:
        if met is not None:
            raise met
    number = max(theirs for node, theirs, _ in told if node == world.node)
    return number, memory or SharedMemory(_get_path(number, LOCALS), False)


def _take_number(streams_local: list[str], streams_remote: list[str | None], retry: int) -> tuple[int, SharedMemory]:
    first = _check_and_find_retrying(streams_local, streams_remote, LOCALS, retry)
    for number in itertools.count(first):
        data, owner = _pack_locals(streams_local, number), None
        # Another run may be faster: the kernel lets only one create it.
        with suppress(FileExistsError, PermissionError, BlockingIOError):
            owner = SharedOwner(number) if MEMORY.is_dir() else None
            if not _has_remains(number):
                memory = _OwnedMemory(_get_path(number, LOCALS), True, len(data))
                memory.buf[: len(data)] = data
                memory.owner = owner
                if owner is not None:
                    owner.note()
                return number, memory
        if owner is not None:
            owner.give_back()
    raise AssertionError("unreachable")


def _has_remains(number: int) -> bool:
    """Whether anything but the folders stands under a number: of a run that is just ending, or was killed."""
    for name in set(SHM_TO_CLEAN) - {LOCALS}:
        try:
            SharedMemory(_get_path(number, name), False, auto_cleanup=False).cleanup()
            return True
        except FileNotFoundError:
            continue
        except (PermissionError, ValueError):  # another user's; or one that has no size yet
            return True
    return any(Path(gettempdir(), _get_path(number, name)).exists() for name in (BARRIER_FILELOCK, CACHE_FILELOCK))
