"""One attempt to bring a file from a place to a disk: what bounds it, and where it may go on."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from composer_path.storage.errors import NO_SUCH_RANGE, Fault, Stopped, cut

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class Limits:
    """What bounds an attempt.

    Args:
        stall: Seconds without a byte.
        deadline: Moment of `time.monotonic()`.
        stopped: Asked now and then.
    """

    stall: float
    deadline: float
    stopped: Callable[[], bool] = lambda: False


@dataclass
class Answer:
    """Bytes of an object on their way.

    Args:
        content_range: What the server says they are, `bytes 0-99/100`; None for all of them.
        length: How many are announced, if that is said.
        pieces: They themselves; an empty piece says that none has come yet.
    """

    content_range: str | None
    length: int | None
    pieces: Iterator[bytes]

    def first(self, wanted: int) -> int:
        """Position of its first byte: the wanted one, or 0 if the server sends all of the object again.

        The range tells: servers are about that send a part with the status 200 of a whole.

        Raises:
            Fault: They are others; joined to what is there, they would make another file.
        """
        found = (self.content_range or "bytes 0-").removeprefix("bytes ").partition("-")[0]
        if found not in (str(wanted), "0"):
            raise cut(f"the bytes from {wanted:,} on were asked for, others came", NO_SUCH_RANGE)
        return int(found)


def fetch(ask: Callable[[int], AbstractContextManager[Answer]], to: Path, limits: Limits, goes_on: bool) -> None:
    """Bring an object to a file.

    Args:
        ask: Asks for its bytes from a position on.
        to: The unfinished file.
        limits: Of this attempt.
        goes_on: Where a cut transfer stopped; else begin again.

    Raises:
        Fault: It failed.
        Stopped: It was called off.
    """
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with open(to, "ab" if goes_on else "wb") as file:
            arrived = file.tell()
            try:
                with ask(arrived) as answer:
                    if (first := answer.first(arrived)) != arrived:
                        _clear(file)
                    for data in answer.pieces:
                        _check(limits, file.tell())
                        try:
                            file.write(data)
                        except OSError as error:  # told apart from the network's
                            raise cache_fault(error) from None
            except Fault as fault:
                if fault.status == NO_SUCH_RANGE:  # the part is as long as the object, or of another one
                    _clear(file)
                raise
            if answer.length is not None and file.tell() < first + answer.length:
                raise cut(f"{file.tell():,} of {first + answer.length:,} bytes arrived")
    except OSError as error:
        raise cache_fault(error) from None


def _clear(file: IO[bytes]) -> None:
    file.seek(0)  # a file open for appending would go on counting from where it was
    file.truncate()


def _check(limits: Limits, arrived: int) -> None:
    if limits.stopped():
        raise Stopped
    if time.monotonic() > limits.deadline:
        fix = "raise fault_timeout, or convert with a smaller --size-limit"
        raise Fault("too-slow", f"{arrived:,} bytes had arrived", fix, transient=True)


def cache_fault(error: OSError) -> Fault:
    """What the cache's disk refused."""
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    if error.errno in _FULL:
        return Fault("cache-full", reason, "free some space, set cache_limit, or choose another folder as local")
    return Fault("cache-not-writable", reason, "choose a folder as local that this user can write to")
