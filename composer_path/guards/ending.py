"""How a run ends before its time: exit codes, and which rank says why. Every verb asks it: nothing of torch here."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable

MISTAKE = 2  # of the user: a setting, a file, a place
NOT_FINITE = 3  # NaN or infinity in loss, gradient or weights
STALLED = 4  # nothing moved for guards.stall_timeout
STOPPED = 75  # as asked (sysexits' EX_TEMPFAIL): the same command goes on
INTERRUPTED = 130  # by Ctrl-C, as shells report it
LOST = 137  # another rank is gone without a word, as one that is killed: what shells report of that

LOST_WORDS = (
    "another rank is gone without a word, as one that the system killed (often for lack of memory), or its machine; "
    "the launcher, or the log of that machine, says which; the same command goes on from the newest checkpoint"
)

_FIRST_WORD = 1.0  # seconds in which rank 0 may say what all ranks met
_ALONE = 8.0  # likewise before ranks know each other
_LINGER = 6.0  # a rank that has said nothing waits for the launcher to end it, which then doesn't print its log


def lost_rank(error: BaseException) -> bool:
    """Whether this is what libraries meet when the process at the other end is gone; gloo has no class for it."""
    words = str(error)
    gloo = "gloo" in words and re.search(r"(closed|reset) by peer|Broken pipe|Connection refused", words) is not None
    return gloo or "ncclRemoteError" in words


def lost_worker(error: BaseException) -> re.Match[str] | None:
    """Number and signal of a loader's worker that a signal ended, as torch says it wherever the main thread is."""
    return re.match(r"DataLoader worker \(pid (\d+)\) is killed by signal: ([\w ]+)", str(error))


class RunStopped(BaseException):
    """A run that was ended on purpose, on all ranks at once; nothing of its results is written.

    Like KeyboardInterrupt it is no Exception: a signal raises it amid libraries, some of which take any for their own.

    Args:
        message: One line: what ended it, at which step, what is saved, how to go on.
        code: The process's exit code.
    """

    def __init__(self, message: str, code: int = STOPPED) -> None:
        super().__init__(message)
        self.code = code


class NotFinite(RunStopped):
    """NaN or infinity where numbers must be."""

    def __init__(self, message: str) -> None:
        super().__init__(message, NOT_FINITE)


class Voice:
    """Which of several ranks says why the run ends: rank 0 for all, and for another rank whose words it hears.

    Args:
        tell: Of a board that all ranks see: takes this rank's exit code and words. Gives the code of the first rank to
            tell, and whether this one must say its words itself.
    """

    tell: Callable[[int, str], tuple[int, bool]] | None = None  # None before ranks know each other

    def __init__(self) -> None:
        rank, ranks = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
        self.rank, self.ranks = int(rank) if rank.isdecimal() else 0, int(ranks) if ranks.isdecimal() else 1

    def say(self, code: int, words: str) -> int:
        """Say why the run ends, unless another rank does; gives the exit code of the run."""
        speaks, tell = True, type(self).tell
        if self.ranks > 1:
            if self.rank:  # what all ranks met, rank 0 says, and the launcher then ends this one
                if not tell and threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(_FIRST_WORD if tell else _ALONE)
            if tell:
                code, speaks = tell(code, words)
        if speaks:
            print(words, file=sys.stderr, flush=True)
        return code

    def leave(self, code: int, agreed: bool) -> int:
        """End this rank soon, whatever its libraries wait for; the launcher's signal to the others isn't a failure.

        Where all ranks have agreed to end, none needs to wait for another.
        """
        if self.ranks > 1 and threading.current_thread() is threading.main_thread():
            sys.stdout.flush()
            if _has_joined():
                end_within(10.0, code)
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self.rank else signal.SIG_IGN)
            if self.rank:
                time.sleep(_FIRST_WORD if agreed else _LINGER)
            elif type(self).tell and not agreed:  # the board lies here: others look at it once a second
                time.sleep(1.5)
        return code


def _has_joined() -> bool:
    """Whether this process is one of several that know of each other: their libraries may wait."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized() and distributed.get_world_size() > 1


def end_within(seconds: float, code: int) -> None:
    """End this process after so long, if it is still there; a library may wait for ranks that are gone."""

    def end() -> None:
        time.sleep(seconds)
        end_now(code)

    threading.Thread(target=end, daemon=True).start()


def end_now(code: int, message: str = "") -> None:
    """End this process at once, without what Python does at its end; a stopped worker wouldn't see it go."""
    if message:
        os.write(2, f"{message}\n".encode())
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(code)
