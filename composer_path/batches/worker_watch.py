"""Workers of a loader that stand still: waiting for them ends in a named error, and they don't hold up a program's end.

A worker that is stopped (SIGSTOP, a debugger, a container's freezer) answers nothing. The loader may then wait for its
turn, for the memory of a batch that it has sent already, or for its word at an epoch's start; torch's own timeout sees
the first of these alone. Killing it ends them all.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

_TICK = 0.5  # s
# As /proc says it.
_STATES = {"T": "is stopped", "t": "is held by a debugger", "D": "waits for a disk", "Z": "has ended"}


class WorkerWatch:
    """Kills a loader's workers when it has waited for them for too long.

    Args:
        timeout: Seconds; 0 waits for ever.
    """

    def __init__(self, timeout: int | float) -> None:
        self.timeout = timeout
        self._workers: list[BaseProcess] = []
        self.found: str | None = None  # why they were killed
        self._process = os.getpid()
        self._waits = False
        self._waited = 0.0
        # When the loader is gone or the program ends; there before multiprocessing waits for them, as it is younger.
        weakref.finalize(self, _end, self._workers, self._process, stopped_only=True)
        if timeout:
            threading.Thread(target=_watch, args=(weakref.ref(self),), name="worker watch", daemon=True).start()

    @property
    def workers(self) -> Sequence[BaseProcess]:
        """The loader's."""
        return self._workers

    @workers.setter
    def workers(self, workers: Sequence[BaseProcess]) -> None:
        self._workers[:] = list(workers)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done in it waits for the workers."""
        self._waited, self._waits = 0.0, True
        try:
            yield
        finally:
            self._waits = False

    def tick(self, seconds: int | float) -> None:
        """So much time has passed. It is counted, as a clock also goes on while all processes are suspended."""
        self._waited += seconds
        if not self._waits or self._waited < self.timeout:
            return
        if self.found is None:
            states = [
                f"worker {number} (process {worker.pid}) {_STATES.get(state_of(worker), 'still runs')}"
                for number, worker in enumerate(self.workers)
            ]
            self.found = f"no batch came within {self.timeout:g} s; {', '.join(states) or 'there are no workers'}"
        # One ends the wait, as torch raises an error when it hears of it; another one's would come into its handling.
        for worker in [one for one in self.workers if one.is_alive()][:1]:
            worker.kill()

    def end(self) -> None:
        """End the workers, without an error of torch's."""
        while True:
            try:
                return _end(self._workers, self._process)
            except RuntimeError:  # whichever child ends meanwhile, torch tells of the killed worker once more
                continue


def _end(workers: Sequence[BaseProcess], process: int, stopped_only: bool = False) -> None:
    """End workers of a process, or those that would never end by themselves."""
    if os.getpid() != process:  # a forked one, whose workers they aren't
        return
    ending = [one for one in workers if one.is_alive() and (not stopped_only or state_of(one) in ("T", "t"))]
    if not ending:
        return
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD)
    try:
        if in_main:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in ending:
            worker.kill()
        for worker in ending:
            worker.join()
    finally:
        if in_main:
            signal.signal(signal.SIGCHLD, before)


def state_of(worker: BaseProcess) -> str:
    """A process's state in a letter, as Linux has it; empty where it can't be told."""
    try:
        return Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _watch(watched: weakref.ref[WorkerWatch]) -> None:
    while (watch := watched()) is not None:
        seconds = min(_TICK, watch.timeout / 4)
        watch.tick(seconds)
        del watch  # or it would live for ever
        time.sleep(seconds)
