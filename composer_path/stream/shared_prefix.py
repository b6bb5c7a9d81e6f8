"""The number under which a dataset's shared memory stands, picked by one process for all of a machine.

Streaming 0.13 lets each rank look for the first free number by itself and creates the memory later. Two runs that start
at the same moment then take the same one (FileExistsError), as does a run beside the remains of one that ended half
way; and ranks that looked at different moments disagree, of which the others learn when their barrier times out.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from tempfile import gettempdir

import streaming.base.dataset
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS, SHM_TO_CLEAN
from streaming.base.shared import SharedMemory
from streaming.base.shared.prefix import _check_and_find_retrying, _check_self, _get_path, _pack_locals
from streaming.base.world import World
from torch import distributed


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

    Args:
        streams_local: Each stream's folder.
        streams_remote: Where it comes from; None if it lies there.
        world: This process's place in it.
        retry: Looks at a folder that another dataset of this machine seems to have.

    Returns:
        The number, and the memory that holds the folders: as long as it is there, the number is taken.

    Raises:
        ValueError: Another dataset of this machine caches in one of the folders; on all ranks.
        OSError: There can't be such memory; on all ranks.
    """
    number, memory = -1, None
    failure: Exception | None = None
    if world.is_local_leader:
        try:
            _check_self(list(streams_local))
            number, memory = _take_number(list(streams_local), list(streams_remote), retry)
        except (ValueError, OSError) as error:
            failure = error
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        told: list[tuple[int, int, Exception | None]] = [(0, 0, None)] * distributed.get_world_size()
        distributed.all_gather_object(told, (world.node, number, failure))
        failure = failure or next((error for _, _, error in told if error is not None), None)
        number = max(theirs for node, theirs, _ in told if node == world.node)
    if failure is not None:
        raise failure
    return number, memory or SharedMemory(_get_path(number, LOCALS), False)


def _take_number(streams_local: list[str], streams_remote: list[str | None], retry: int) -> tuple[int, SharedMemory]:
    first = _check_and_find_retrying(streams_local, streams_remote, LOCALS, retry)
    for number in itertools.count(first):
        if _has_remains(number):
            continue
        data = _pack_locals(streams_local, number)
        try:
            memory = SharedMemory(_get_path(number, LOCALS), True, len(data))
        except (FileExistsError, PermissionError):  # another run was faster: the kernel lets only one create it
            continue
        memory.buf[: len(data)] = data
        return number, memory
    raise AssertionError("unreachable")


def _has_remains(number: int) -> bool:
    """Whether anything but the folders stands under a number: of a run that is just ending, or was killed."""
    locks = (BARRIER_FILELOCK, CACHE_FILELOCK)
    if any(os.path.exists(os.path.join(gettempdir(), _get_path(number, name))) for name in locks):
        return True
    for name in SHM_TO_CLEAN:
        try:
            if name != LOCALS:
                SharedMemory(_get_path(number, name), False, auto_cleanup=False).cleanup()
                return True
        except FileNotFoundError:
            continue
        except (PermissionError, ValueError):  # another user's; or one that has no size yet
            return True
    return False
