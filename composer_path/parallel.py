"""One function over many items in several threads or processes: results in order, few items in memory at once.

What fails is told at once, not when its turn comes. Who stops asking for results stops the work. Processes leave Ctrl-C
to their parent, and end when it is gone.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
# Called with the number of records and the bytes that are done since the last call.
Report = Callable[[int, int], None]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_SECONDS = 0.2  # between two looks at what the workers do
_STOP, _RECORDS, _BYTES = range(3)


class ProcessKilled(OSError):
    """A worker was killed from outside."""


class Stopped(Exception):
    """Nobody waits for the result any more; ends a worker's task early."""


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int | None = None
) -> Iterator[Result]:
    """Map in several threads; in this one if `workers` is 1.

    Items are taken one by one, as results are asked for; `ahead` of them (three times the threads) are on their way.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from _in_order(lambda item: pool.submit(function, item), items, ahead or 3 * workers)


def in_processes(
    function: Callable[..., Result],
    items: Iterable[Item],
    workers: int,
    report: Report | None = None,
    fork: bool = False,
) -> Iterator[Result]:
    """Map in several processes; in this one if `workers` is 1. Raises `ProcessKilled` if one was killed.

    Items are taken one by one, as results are asked for. Where a `report` is given, `function` gets one of its own
    beside the item, and `report` is called now and then with what all processes have done. `fork` takes all items at
    once, and starts processes that have them and all modules in memory, where imports and sending items would take
    seconds: only where no thread was started, as a fork of a process with threads (torch, a notebook) can hang.
    """
    at_hand = list(items) if fork else None
    if at_hand is not None:
        items, workers = at_hand, min(workers, len(at_hand))
    if workers <= 1:
        yield from (function(item) if report is None else function(item, report) for item in items)
        return
    context = multiprocessing.get_context("fork" if fork else "spawn")
    shared: Any = context.Array("q", 3)

    def tell() -> None:
        with shared.get_lock():
            records, num_bytes = shared[_RECORDS], shared[_BYTES]
            shared[_RECORDS] = shared[_BYTES] = 0
        if report is not None:
            report(records, num_bytes)

    pool = ProcessPoolExecutor(workers, context, _start, (function, at_hand, shared, report is not None))
    tasks: Iterable[Any] = items if at_hand is None else range(len(at_hand))
    try:
        yield from _in_order(lambda task: pool.submit(_work, task), tasks, 2 * workers, tell)
    except BrokenProcessPool:
        raise ProcessKilled("a process was killed, perhaps for lack of memory (then take fewer --workers)") from None
    finally:
        shared[_STOP] = 1
        pool.shutdown(wait=True, cancel_futures=True)


def end_with_parent(worker_id: int = 0) -> None:
    """Let this process end when its parent does, even by SIGKILL: nobody else would end it."""
    parent = multiprocessing.parent_process()
    pid = os.getppid() if parent is None else parent.pid

    def watch() -> None:
        while os.getppid() == pid:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def heed_only_parent() -> None:
    """Let a worker end when its parent says so, and not by a signal that Ctrl-C or a cluster sends to all processes.

    The parent finishes its step first, for which it needs the workers.
    """
    parent, ending = os.getppid(), {signal.SIGTERM}
    with suppress(ValueError):  # not the main thread, or none was set
        signal.set_wakeup_fd(-1)  # the parent's, whose signals these are not
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)

    def wait() -> None:
        while signal.sigwaitinfo(ending).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def keep_freed_memory() -> None:
    """Let this process keep what it frees, up to 64 MiB, for what it needs next.

    By itself glibc gives an image's memory back each time, and the system clears the next one's pages again. Other C
    libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and platform.libc_ver()[0] == "glibc":
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # larger pieces are mapped and given back; more is not allowed
        mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)


def _in_order(
    submit: Callable[[Any], Future[Result]], items: Iterable[Any], ahead: int, tell: Callable[[], None] = lambda: None
) -> Iterator[Result]:
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(submit(item))
            if len(pending) >= ahead:
                yield _next(pending, tell)
        while pending:
            yield _next(pending, tell)
    finally:
        for future in pending:
            future.cancel()


def _next(pending: deque[Future[Result]], tell: Callable[[], None]) -> Result:
    while not pending[0].done():
        wait([pending[0]], timeout=_SECONDS)
        tell()
        for other in filter(Future.done, pending):
            if other.exception() is not None:
                other.result()
    tell()
    return pending.popleft().result()


# What a worker works with: the function, all items if it was forked, the counts, and whether it reports.
_job: tuple[Callable[..., Any], list[Any] | None, Any, bool] | None = None


def _start(*job: Any) -> None:
    global _job
    _job = job  # type: ignore[assignment]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and decides
    end_with_parent()


def _work(task: Any) -> Any:
    assert _job is not None
    function, items, shared, reports = _job
    item = task if items is None else items[task]
    if not reports:
        return function(item)
    tally = _Tally(shared)
    result = function(item, tally)
    tally.flush()
    return result


class _Tally:
    """What a worker has done since it last told its parent."""

    def __init__(self, shared: Any) -> None:
        self._shared = shared
        self._records = self._bytes = 0
        self._last = time.monotonic()

    def __call__(self, records: int, num_bytes: int) -> None:
        self._records, self._bytes = self._records + records, self._bytes + num_bytes
        if time.monotonic() - self._last > _SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._shared[_STOP]:
            raise Stopped
        with self._shared.get_lock():
            self._shared[_RECORDS] += self._records
            self._shared[_BYTES] += self._bytes
        self._records, self._bytes, self._last = 0, 0, time.monotonic()
