"""Gives back the shared memory that Streaming would keep until the process ends."""

from __future__ import annotations

import atexit
import contextlib
import gc
import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _close_shared_memory() -> Iterator[None]:
    """Each dataset holds some 40 open files: too many in one run of all tests."""
    yield
    memory = sys.modules.get("streaming.base.shared.memory")
    if memory is None:
        return
    gc.collect()
    for block in [item for item in gc.get_objects() if isinstance(item, memory.SharedMemory)]:
        with contextlib.suppress(BufferError):  # a dataset that is still alive
            block.cleanup()
        atexit.unregister(block.cleanup)
