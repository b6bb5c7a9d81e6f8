"""Gives back the shared memory that Streaming would keep until the process ends."""

from __future__ import annotations

import atexit
import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module", autouse=True)
def _close_shared_memory() -> Iterator[None]:
    """Each dataset holds some 40 open files: too many in one run of all tests."""
    from streaming.base.shared import memory

    made: weakref.WeakSet[Any] = weakref.WeakSet()
    start = memory.SharedMemory.__init__

    def start_and_note(self: Any, *args: Any, **kwargs: Any) -> None:
        made.add(self)
        start(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory.SharedMemory, "__init__", start_and_note)
        yield
    if made:
        gc.collect()
    for block in list(made):
        with contextlib.suppress(BufferError):  # a dataset that is still alive
            block.cleanup()
        atexit.unregister(block.cleanup)
