"""A thread beside the run: it reads signals, sees that nothing moves any more, and that another rank has failed."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import torch
from composer.utils import dist

from composer_path.guards.ending import STALLED, end_now
from composer_path.guards.ranks import FailureBoard
from composer_path.guards.requests import StopRequests

_LOOK = 0.5  # seconds between two looks
_GRACE = 2.0  # seconds that the main thread has to end by itself after another rank failed
_LAST_WORDS = 2.0  # in which the other ranks say where they wait, before the launcher ends them
_FRAMES = 12
START = "the start (reading weights, first data, compiling)"


class Watch:
    """Ends the process where its main thread can't.

    Args:
        timeout: Seconds in which something must move; four times as many before the first step has ended. None never
            ends it.
        requests: Whose signals are read here.
        board: Where another rank's failure stands.
        run_folder: For what NCCL last did, where it keeps that.
    """

    def __init__(
        self, timeout: int | float | None, requests: StopRequests, board: FailureBoard, run_folder: Path
    ) -> None:
        self.timeout, self.requests, self.board, self.run_folder = timeout, requests, board, run_folder
        self.waits_for, self.moves, self.step, self.first_step = START, 0, 0, True
        self.ended = threading.Event()
        self.failed: int | None = None  # the exit code of a rank that failed
        self.main = threading.get_ident()
        self.thread = threading.Thread(target=self._look, name="guards", daemon=True)
        self.listener = threading.Thread(target=self._listen, name="failure board", daemon=True)

    def start(self) -> None:
        """Look from now on."""
        self.thread.start()
        self.listener.start()

    def stop(self) -> None:
        """Look no more."""
        self.ended.set()
        self.thread.join()
        self.listener.join(_GRACE)

    def mark(self, waits_for: str) -> None:
        """Something moved, and what the run does now."""
        self.waits_for = waits_for
        self.moves += 1

    def _look(self) -> None:
        still, seen, since_failure, last = 0.0, -1, 0.0, time.monotonic()
        while not self.ended.is_set():
            with suppress(OSError, ValueError):
                select.select([self.requests.pipe[0]], [], [], _LOOK)
            if self.ended.is_set():
                return
            self.requests.read()
            now = time.monotonic()
            # What a stopped or sleeping machine was away isn't counted: only time in which this thread runs is.
            passed, last = min(now - last, 4 * _LOOK), now
            still = 0.0 if seen != self.moves else still + passed
            seen = self.moves
            patience = None if self.timeout is None else self.timeout * (4 if self.first_step else 1)
            if patience is not None and still > patience:
                self._end_stalled(still)
            if self.failed is not None:
                since_failure = since_failure or now
                if now - since_failure > _GRACE:
                    end_now(self.failed)
            self.requests.end_start(_GRACE)

    def _listen(self) -> None:
        """Ask the board, in a thread of its own: rank 0, on which it lies, may be the one that hangs."""
        while not self.ended.wait(2 * _LOOK):
            self.failed = self.board.failed()

    def _end_stalled(self, seconds: float) -> None:
        rank = dist.get_global_rank()
        where = " < ".join(f"{path}:{line} {name}" for path, line, name in stack_of(self.main))
        message = (
            f"rank {rank}: nothing moved for {seconds:.0f} s (guards.stall_timeout) after step {self.step}; it waited "
            f"for {self.waits_for}; at {where}; look at the rank that waits for something else than the others, "
            "then start the same command again"
        )
        if trace := self._nccl_trace(rank):
            message += f"; NCCL's last calls are in {trace}"
        os.write(2, f"{message}\n".encode())
        if dist.get_world_size() > 1:
            self.board.tell(STALLED, message) if rank == 0 else None
            time.sleep(_LAST_WORDS)
        end_now(STALLED)

    def _nccl_trace(self, rank: int) -> Path | None:
        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
        if dump is None or not torch.cuda.is_available():
            return None
        path = self.run_folder / f"nccl_trace_rank{rank}.pkl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(dump())
        except Exception:  # nothing may keep the process from ending
            return None
        return path


def stack_of(thread: int) -> list[tuple[str, int, str]]:
    """Where a thread is: file, line and function, innermost first; no values."""
    frame: FrameType | None = sys._current_frames().get(thread)
    places: list[tuple[str, int, str]] = []
    while frame is not None and len(places) < _FRAMES:
        path = frame.f_code.co_filename
        short = "/".join(path.split("/")[-3:])
        places.append((short, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return places
