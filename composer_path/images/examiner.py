"""Has untrusted pictures examined in other processes: what kills a decoder is an error of that picture.

The processes are shared by all examiners of this one, started when they are needed and end by themselves.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from composer_path.images.examining_process import seconds_for
from composer_path.images.file import MAX_PIXELS
from composer_path.images.forked import fork_process
from composer_path.images.memory import ImageMemory
from composer_path.images.shared_bytes import SharedBytes
from composer_path.images.stored_square import Square
from composer_path.parallel import ProcessKilled
from composer_path.records.rules import ImageError
from composer_path.records.slide_region import OpenSlideMissing, SlideRegion, require_openslide

# A process that has used no CPU time for so long (a disk may be slow) stands still.
_STILL_SECONDS = 300.0
_LOOK_SECONDS = 5.0
# How a decoder dies by its own fault.
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP, signal.SIGSYS}


@dataclass(frozen=True)
class Examined:
    """What is stored of a picture, what is odd about it, and micrometres per pixel as a slide's file says it."""

    data: bytes
    oddities: list[str] = field(default_factory=list)
    mpp: float | None = None


class Examiner:
    """Examines pictures in processes of their own, as many at once as `memory` says; for several threads."""

    def __init__(self, memory: ImageMemory | None = None) -> None:
        self.memory = memory or ImageMemory()

    def examine(
        self,
        data: bytes,
        max_pixels: int = MAX_PIXELS,
        scale_levels: bool = False,
        square: Square | None = None,
        complete: bool = True,
        alone: bool = False,
    ) -> Examined:
        """What is stored of an image file, see `examine_image`; with `square` the finished square.

        Without `complete` a JPEG whose data end early becomes a square all the same. `alone` says that the caller is
        within `memory.alone()`.

        Raises:
            ImageError: As `examine_image`, `too-large`, and where its decoder dies or doesn't end.
            ProcessKilled: The process was killed from outside, twice.
        """
        request = {"task": "examine", "scale_levels": scale_levels, "complete": complete}
        return self._ask(request, data, max_pixels, square, alone)

    def check(self, data: bytes, max_pixels: int = MAX_PIXELS) -> list[str]:
        """Check that a stored image can be decoded in full, see `check_image`; raises as `examine`."""
        return self._ask({"task": "check"}, data, max_pixels).oddities

    def region(
        self, path: str | Path, region: SlideRegion, max_pixels: int = MAX_PIXELS, square: Square | None = None
    ) -> Examined:
        """What is stored of a slide's region, see `read_region`; raises as that and as `examine`."""
        require_openslide()  # told before a process is started
        request = {"task": "region", "path": os.fspath(path), "region": asdict(region)}
        return self._ask(request, b"", max_pixels, square)

    def _ask(
        self, request: dict[str, Any], data: bytes, max_pixels: int, square: Square | None = None, alone: bool = False
    ) -> Examined:
        request |= {"max_pixels": max_pixels, "square": None if square is None else asdict(square)}
        granted = self.memory.largest if alone else self.memory.share
        answer, stored = _answered(request | {"granted": granted}, data)
        if "needs" in answer:
            needed = answer["needs"]
            if needed > self.memory.largest:
                found = f"one that takes {needed // 2**20} MB to decode"
                now = f"one may take half of it, {self.memory.largest // 2**20} MB now"
                fix = f"crop it, or raise --image-memory ({now})"
                raise ImageError("too-large", found, fix)
            with self.memory.alone():
                answer, stored = _answered(request | {"granted": needed}, data)
        if "missing" in answer:
            raise OpenSlideMissing(answer["missing"])
        if "error" in answer:
            raise ImageError(*answer["error"])
        return Examined(stored, answer["oddities"], answer.get("mpp"))


class _Died(Exception):
    """The process ended over a request; `code` as `Popen` says it, None if it stood still."""

    def __init__(self, code: int | None) -> None:
        self.code = code


class _Process:
    """One process that examines, and this end of its pipe."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._bytes = SharedBytes.new()
        with theirs:
            self._process = fork_process(theirs.fileno(), self._bytes.descriptor)
        self._connection, self._answer = Connection(ours.detach()), select.poll()
        self._answer.register(self._connection.fileno(), select.POLLIN)
        self.used = False

    def ask(self, request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        """Ask, and wait for the answer; `_Died` says that there is none."""
        try:
            self._bytes.write(data)
            self._connection.send_bytes(json.dumps(request | {"num_bytes": len(data)}).encode())
            self._wait()
            said = json.loads(self._connection.recv_bytes())
            answer = said, data if said.get("unchanged") else self._bytes.read(said["num_bytes"])
        except (EOFError, OSError):
            raise _Died(self._process.wait()) from None
        self.used = True
        return answer

    def end(self) -> None:
        """Kill it, whatever it does."""
        self._connection.close()
        self._bytes.close()
        self._process.kill()
        self._process.wait()

    def _wait(self) -> None:
        if self._answer.poll(1000 * _LOOK_SECONDS):  # by then nearly always, and nothing more is asked of the system
            return
        before, still = self._cpu_time(), 0.0
        while not self._answer.poll(1000 * _LOOK_SECONDS):
            now = self._cpu_time()
            still, before = 0.0 if now != before else still + _LOOK_SECONDS, now
            if still >= _STILL_SECONDS:
                raise _Died(None)

    def _cpu_time(self) -> bytes:
        """User and system time of the process, where the system tells."""
        with suppress(OSError):
            fields = Path(f"/proc/{self._process.pid}/stat").read_bytes().rpartition(b")")[2].split()
            return b" ".join(fields[11:13])
        return b""


# Those that nobody is using; a forked process has none of its parent's.
_idle: list[_Process] = []
_owner = os.getpid()
_lock = threading.Lock()


@contextmanager
def _taken() -> Iterator[_Process]:
    """A process for one request, which goes on living if it was answered."""
    global _owner
    with _lock:
        if _owner != os.getpid():
            _idle.clear()
            _owner = os.getpid()
        process = _idle.pop() if _idle else None
    process = process or _Process()
    try:
        yield process
    except BaseException:
        process.end()
        raise
    with _lock:
        _idle.append(process)


def _answered(request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    """Ask a process; where one dies that has examined others before, a new one tells whose fault it is."""
    killed = 0
    while True:
        used = False
        try:
            with _taken() as process:
                used = process.used
                return process.ask(request, data)
        except _Died as died:
            if used:
                continue
            if died.code is not None and -died.code not in {*_CRASHES, signal.SIGXCPU}:
                killed += 1
                if killed > 1:
                    raise ProcessKilled(
                        "a process that decodes an image was killed, perhaps for lack of memory (then lower "
                        "--image-memory, or take fewer --workers)"
                    ) from None
                continue
            raise _error(request, data, died) from None


def _error(request: dict[str, Any], data: bytes, died: _Died) -> ImageError:
    what = "one of a slide" if request["task"] == "region" else f"one of {len(data)} bytes"
    if died.code is None:
        how = f"over which its decoder stood still for {_STILL_SECONDS:.0f} s"
    elif -died.code == signal.SIGXCPU:
        how = f"over which its decoder took more than {seconds_for(request['granted'])} s"
    else:
        how = f"that crashes its decoder ({signal.Signals(-died.code).name})"
    return ImageError("unreadable-image", f"{what} {how}", "replace the file")
