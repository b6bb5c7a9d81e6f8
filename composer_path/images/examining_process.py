"""The process in which untrusted pictures are parsed and decoded; it may die of one, and nothing else does.

It is forked from one that imports what it takes, so that many cost little more than one (images/forked.py). It is asked
over a pipe, one picture after the other, by `composer_path.images.examiner`, and answers with JSON; files and what is
stored of them lie in memory that both share. So nothing it says can be more than values and bytes. What it takes of
memory and time is bounded for each picture.
"""

from __future__ import annotations

import json
import math
import os
import resource
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from PIL import Image

from composer_path.images.file import check_image, decode_picture, examine_image, memory_of, open_image, to_rgb
from composer_path.images.fitting import fit_square, rgb_image
from composer_path.images.plain_pixels import oddities
from composer_path.images.shared_bytes import SharedBytes
from composer_path.images.stored_square import Square, pack_square
from composer_path.parallel import end_with_parent, keep_freed_memory
from composer_path.records.rules import ImageError
from composer_path.records.slide_region import OpenSlideMissing, SlideRegion, mpp_of, png_of, read_region

# Beside what a picture takes by its size: libraries' own buffers, tiles of a slide.
_MORE_MEMORY = 256 * 2**20
_SECONDS, _BYTES_PER_SECOND = 20, 16e6
# One that nobody asks for so long ends.
_IDLE_SECONDS = 60
# One that only forks takes no time, and 45 MB that those it has forked share.
_SOURCE_IDLE_SECONDS = 600
NUMBER = struct.Struct("=i")  # as `serve_forked` tells it
_REGION_BYTES_PER_PIXEL = 16
_PAGE = os.sysconf("SC_PAGE_SIZE")


class _Needs(Exception):
    """More memory than was granted."""


def seconds_for(granted: int) -> int:
    """CPU time that a picture of so many bytes may take: ten times what an ordinary one does."""
    return _SECONDS + int(granted / _BYTES_PER_SECOND)


def serve_forked(control: int) -> None:
    """Fork a process for each who asks, and tell how it ended; until the parent is gone, or nobody has asked for long.

    With a byte come three descriptors: the pipe and the file of `serve`, and a pipe into which the process's number is
    written, and then how it ended, as `os.waitstatus_to_exitcode` says it.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the parent gets them too, and decides
    signal.signal(signal.SIGCHLD, lambda *_: None)
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    parent, asking, asked = os.getppid(), socket.socket(fileno=control), select.poll()
    asked.register(asking, select.POLLIN)
    asked.register(woken, select.POLLIN)
    reports: dict[int, int] = {}
    last = time.monotonic()
    while os.getppid() == parent and (reports or time.monotonic() - last < _SOURCE_IDLE_SECONDS):
        ready = {descriptor for descriptor, _ in asked.poll(500)}
        if woken in ready:
            os.read(woken, 512)
            _tell_ended(reports)
        if control in ready:
            byte, descriptors, _, _ = socket.recv_fds(asking, 1, 3)
            if not byte:
                return
            pipe, file, report = descriptors
            last, pid = time.monotonic(), os.fork()
            if pid == 0:
                _serve_and_end(pipe, file, [control, woken, wakes, report, *reports.values()])
            reports[pid] = report
            os.close(pipe)
            os.close(file)
            _tell(report, pid)


def _serve_and_end(pipe: int, file: int, leave: Sequence[int]) -> NoReturn:
    """Be a forked process, without the descriptors that are its parent's affair."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in leave:
            os.close(descriptor)
        serve(pipe, file)
        code = 0
    finally:
        os._exit(code)


def _tell_ended(reports: dict[int, int]) -> None:
    """Of each process that has ended, how."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            report = reports.pop(ended[0])
            _tell(report, os.waitstatus_to_exitcode(ended[1]))
            os.close(report)


def _tell(report: int, number: int) -> None:
    with suppress(OSError):  # who asked is gone
        os.write(report, NUMBER.pack(number))


def serve(pipe: int, file: int) -> None:
    """Answer until nobody asks any more."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    end_with_parent()
    keep_freed_memory()
    connection, shared, asked = Connection(pipe), SharedBytes(file), select.poll()
    asked.register(pipe, select.POLLIN)
    with suppress(EOFError, OSError):
        while asked.poll(1000 * _IDLE_SECONDS):
            request = json.loads(connection.recv_bytes())
            data = shared.read(request["num_bytes"])
            answer, stored = _answer(request, data)
            if stored == data:  # as of most JPEGs: who asked has them
                answer["unchanged"], stored = True, b""
            shared.write(stored)
            connection.send_bytes(json.dumps(answer | {"num_bytes": len(stored)}).encode())


def _answer(request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    granted = request["granted"]
    _bound(granted)
    try:
        return _TASKS[request["task"]](request, data)
    except ImageError as error:
        return {"error": [error.rule, error.found, error.fix]}, b""
    except OpenSlideMissing as error:
        return {"missing": str(error)}, b""
    except _Needs as error:
        return {"needs": error.args[0]}, b""
    except MemoryError:
        found = f"one of {len(data)} bytes that takes more than {granted // 2**20} MB to decode"
        return {"error": ["too-large", found, "crop it, or raise --image-memory"]}, b""
    except Exception as error:  # by a mistake of ours: it must not be the set's end either
        found = f"one of {len(data)} bytes that can't be examined ({type(error).__name__})"
        return {"error": ["unreadable-image", found, "replace the file"]}, b""


def _bound(granted: int) -> None:
    """Let this picture take no more than was granted of memory, and of time in proportion."""
    seconds = math.ceil(sum(resource.getrusage(resource.RUSAGE_SELF)[:2])) + seconds_for(granted)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    with suppress(OSError, ValueError):  # only Linux says how much there is already
        taken = int(os.pread(_memory_file(), 64, 0).split()[0]) * _PAGE
        limit, hard = taken + granted + _MORE_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))


@cache
def _memory_file() -> int:
    """Where Linux says how much memory this process has; opened once, as it is read for each picture."""
    return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)


def _require(needed: int, granted: int) -> None:
    if needed > granted:
        raise _Needs(needed)


def _within(request: dict[str, Any]) -> Callable[[int], None]:
    """What refuses a picture that takes more than was granted."""
    return partial(_require, granted=request["granted"])


def _check(request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    return {"oddities": check_image(data, request["max_pixels"], _within(request))}, b""


def _examine(request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    max_pixels, scale_levels = request["max_pixels"], request["scale_levels"]
    if (square := _square(request)) is None:
        stored = examine_image(data, max_pixels, scale_levels, _within(request))
        return {"oddities": stored.oddities}, stored.data
    header = open_image(data, max_pixels)
    _require(max(memory_of(data, max_pixels), _square_bytes(*header.size)), request["granted"])
    if header.format == "JPEG":  # decoding alone doesn't find data that end early
        odd = check_image(data, max_pixels) if request["complete"] else []
        image = rgb_image(data, max_pixels)
    else:
        image, odd = decode_picture(data, max_pixels, scale_levels)
    return {"oddities": odd}, _fitted(to_rgb(image), square)


def _read_region(request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    region, square, path = SlideRegion(**request["region"]), _square(request), request["path"]
    # What has too many pixels is refused for that.
    pixels = min(region.width * region.height, request["max_pixels"])
    needed = pixels * _REGION_BYTES_PER_PIXEL
    _require(needed if square is None else needed + _square_bytes(region.width, region.height), request["granted"])
    image, mpp = read_region(path, region, request["max_pixels"]), mpp_of(path, region.level)
    return {"mpp": mpp, "oddities": oddities(image)}, png_of(image) if square is None else _fitted(image, square)


def _square(request: dict[str, Any]) -> Square | None:
    return None if request["square"] is None else Square.of(**request["square"])


def _square_bytes(width: int, height: int) -> int:
    """Of a picture, padded, and once more while it is resized."""
    return 4 * width * height + 8 * min(max(width, height), 2**16) ** 2


def _fitted(image: Image.Image, square: Square) -> bytes:
    pad_color = square.pad_color or (0, 0, 0)  # cropped ones have none
    return pack_square(fit_square(image, square.image_size, square.fit, pad_color), square)


_TASKS = {"check": _check, "examine": _examine, "region": _read_region}
