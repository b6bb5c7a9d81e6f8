"""One attempt to bring a file from a place to a disk: what bounds it, and where it may go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from composer_path.storage.errors import NO_SUCH_RANGE, Fault, Stopped, cache_fault, passing


@dataclass
class Limits:
    """What bounds an attempt."""

    stall: float  # seconds without a byte
    deadline: float  # moment of `time.monotonic()`
    stopped: Callable[[], bool] = lambda: False  # asked now and then


@dataclass
class Answer:
    """Bytes of an object on their way."""

    content_range: str | None  # what the server says they are, `bytes 0-99/100`; None for all of them
    length: int | None  # how many are announced, if that is said
    pieces: Iterator[bytes]  # an empty piece says that none has come yet

    def first(self, wanted: int) -> int:
        """Position of its first byte: the wanted one, or 0 if the server sends all of the object again.

        The range tells: servers are about that send a part with the status 200 of a whole. Other bytes, which would
        make another file with what is there, raise `Fault`.
        """
        found = (self.content_range or "bytes 0-").removeprefix("bytes ").partition("-")[0]
        if found not in (str(wanted), "0"):
            raise passing("cut", f"the bytes from {wanted:,} on were asked for, others came", NO_SUCH_RANGE)
        return int(found)


def fetch(ask: Callable[[int], AbstractContextManager[Answer]], to: Path, limits: Limits, goes_on: bool) -> None:
    """Bring an object to an unfinished file, or raise `Fault`, or `Stopped` if it was called off.

    `ask` asks for its bytes from a position on: where a cut transfer stopped if it `goes_on`, else the first.
    """
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with open(to, "ab" if goes_on else "wb") as file:
            arrived = file.tell()
            try:
                with ask(arrived) as answer:
                    if (first := answer.first(arrived)) != arrived:
                        file.truncate(file.seek(0))  # open for appending, it would go on counting from where it was
                    for data in answer.pieces:
                        _check(limits, file.tell(), came=file.tell() > first)
                        try:
                            file.write(data)
                        except OSError as error:  # told apart from the network's
                            raise cache_fault(error) from None
            except Fault as fault:
                if fault.status == NO_SUCH_RANGE:  # the part is as long as the object, or of another one
                    file.truncate(file.seek(0))
                raise
            if answer.length is not None and file.tell() < first + answer.length:
                raise passing("cut", f"{file.tell():,} of {first + answer.length:,} bytes arrived")
    except OSError as error:
        raise cache_fault(error) from None


def _check(limits: Limits, arrived: int, came: bool) -> None:
    if limits.stopped():
        raise Stopped
    if time.monotonic() > limits.deadline:
        if not came:  # a client that tries and tries, such as Azure's, OCI's or Hugging Face's
            raise passing("unreachable", "nothing came until the deadline")
        fix = "raise fault_timeout, or convert with a smaller --size-limit"
        raise Fault("too-slow", f"{arrived:,} bytes had arrived", fix, transient=True)
