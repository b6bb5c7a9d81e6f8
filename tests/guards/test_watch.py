"""The thread beside a run, where what it asks doesn't answer."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from composer_path.guards import watch as watch_module
from composer_path.guards.ending import STALLED
from composer_path.guards.ranks import FailureBoard
from composer_path.guards.requests import StopRequests


class FrozenBoard(FailureBoard):
    """As where rank 0, on which it lies, is stopped."""

    def __init__(self, free: threading.Event) -> None:
        super().__init__()
        self.free = free

    def failed(self) -> int | None:
        self.free.wait(30)
        return None


def test_a_frozen_rank_0_keeps_no_other_from_seeing_that_nothing_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, ended, codes = threading.Event(), threading.Event(), list[int]()

    def end(code: int, message: str = "") -> None:
        codes.append(code)
        ended.set()
        watch.ended.set()

    monkeypatch.setattr(watch_module, "end_now", end)
    watch = watch_module.Watch(1.2, StopRequests([], None), FrozenBoard(free), tmp_path)
    watch.first_step = False
    watch.start()
    assert ended.wait(10) and codes == [STALLED]
    free.set()
    watch.stop()
