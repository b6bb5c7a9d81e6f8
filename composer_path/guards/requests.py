"""Requests to stop: signals, and the wall clock. They are noted, and obeyed between steps."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

import psutil

from composer_path.guards.ending import INTERRUPTED, STOPPED, RunStopped, end_now

_SAME_REQUEST = 1.0  # seconds: a cluster signals launcher and ranks, and the launcher the ranks again
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PR_SET_PDEATHSIG = 1
_BEFORE_STEPS = "stopped by {} before the first step of this start; the same command starts again"
TIME_IS_UP, CTRL_C = 255, 256  # where a signal's number stands; of several reasons the largest counts


def seconds_of(duration: str | int | float) -> float:
    """Seconds of a duration such as `11.5h`, `90m` or `3600s`; a number is seconds; ValueError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*", str(duration))
    seconds = float(found[1]) * _SECONDS[found[2] or "s"] if found else 0.0
    if seconds <= 0:
        raise ValueError(f"found {duration}, which is no duration; write a number above 0 and a unit, as in 11.5h, 90m")
    return seconds


def words_of(reason: int) -> str:
    """What asked for the stop."""
    return {TIME_IS_UP: "guards.stop_after", CTRL_C: "SIGINT"}.get(reason) or signal.Signals(reason).name


def code_of(reason: int) -> int:
    """The exit code of a run that obeyed."""
    return INTERRUPTED if reason in (CTRL_C, signal.SIGINT) else STOPPED


def end_with_launcher() -> None:
    """Ask for SIGTERM at the death of a launcher, which nobody else would tell its ranks; SIGKILL leaves it no word.

    It is known by what it sets, and by being a Python program: a shell may leave before the run that it started.
    """
    with suppress(OSError):
        if "LOCAL_RANK" in os.environ and os.path.samefile(f"/proc/{os.getppid()}/exe", "/proc/self/exe"):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


class StopRequests:
    """What has asked this process to stop.

    The first signal is noted and said. A second one, not of the same moment, ends the process at once, also when its
    main thread hangs in a library: the system's own handler writes each signal's number to a pipe, which a thread of
    `Watch` reads.

    Args:
        signals: Names of those that end the run well, beside SIGINT.
        stop_after: Seconds after the process's start.
    """

    def __init__(self, signals: Sequence[str], stop_after: float | None) -> None:
        self.numbers = [signal.SIGINT, *(signal.Signals[name] for name in signals)]
        self.until = None if stop_after is None else psutil.Process().create_time() + stop_after
        self.first: tuple[int, float] | None = None
        self.before_steps = True  # nothing is trained yet: a signal ends the run where it is
        self.settled = False  # the run is ending: what comes now changes nothing
        self.pid, self.pipe = os.getpid(), os.pipe()
        self._earlier: tuple[int, dict[int, Any]] | None = None
        for end in self.pipe:
            os.set_blocking(end, False)

    def install(self) -> None:
        """Take the signals over, if this is the main thread; nobody else may."""
        if threading.current_thread() is threading.main_thread():
            # Python's tracker of shared memory ignores but two of these: it gets the others blocked, and keeps them so.
            earlier = signal.pthread_sigmask(signal.SIG_BLOCK, self.numbers)
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
            handlers: dict[int, Any] = {number: signal.signal(number, self._interrupt) for number in self.numbers}
            self._earlier = signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False), handlers
            end_with_launcher()

    def restore(self) -> None:
        """Give them back."""
        if self._earlier is not None and os.getpid() == self.pid:
            wakeup, handlers = self._earlier
            signal.set_wakeup_fd(wakeup)
            for number, handler in handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            self._earlier = None
        for end in self.pipe:
            with suppress(OSError):
                os.close(end)

    def reason(self) -> int:
        """The signal's number, `CTRL_C`, `TIME_IS_UP`, or 0 for none."""
        self.read()
        if self.first is not None:
            return CTRL_C if self.first[0] == signal.SIGINT else self.first[0]
        return TIME_IS_UP if self.until is not None and time.time() >= self.until else 0

    def end_start(self, patience: float) -> None:
        """End a start that a signal should have ended so many seconds ago: a library holds it, and waits for ranks."""
        if self.first is None or not self.before_steps or self.settled or time.monotonic() - self.first[1] <= patience:
            return
        if os.environ.get("RANK", "0") != "0":  # the launcher prints no log of a rank that a signal ended
            os.kill(self.pid, signal.SIGKILL)
        end_now(code_of(self.reason()), f"composer-path train: {_BEFORE_STEPS.format(words_of(self.reason()))}")

    def read(self) -> None:
        """Note what has come."""
        with suppress(BlockingIOError, OSError):
            for number in os.read(self.pipe[0], 64):
                if number in self.numbers and not self.settled:
                    self._note(number)

    def _note(self, number: int) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if self.first is None:
            self.first = number, now
            if os.environ.get("RANK", "0") == "0":
                doing = "nothing is trained yet" if self.before_steps else "the step in progress is finished and saved"
                os.write(2, f"{name}: {doing}; a second one ends the process at once\n".encode())
        elif now - self.first[1] <= _SAME_REQUEST:
            if number == signal.SIGINT:  # from which the launcher made the other
                self.first = number, self.first[1]
        else:
            end_now(128 + number, f"{name} again: ended at once, without a checkpoint of this step")

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.before_steps and not self.settled and os.getpid() == self.pid:
            self.settled = True
            raise RunStopped(_BEFORE_STEPS.format(words_of(number)), code_of(number))
