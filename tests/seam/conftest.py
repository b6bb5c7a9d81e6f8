"""Tests of Streaming give its shared memory back, and keep clear of other processes on this machine."""

import itertools
import os
from collections.abc import Iterator

import pytest
from streaming_memory import _close_shared_memory  # noqa: F401 (a fixture)


@pytest.fixture(scope="module", autouse=True)
def _number_shared_memory_by_process() -> Iterator[None]:
    """Streaming looks for the first free number, which another run may take at the same moment."""
    from streaming.base.shared import prefix

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "_each_prefix_int", lambda: itertools.count(100_000 + os.getpid() % 800_000))
        yield
