"""Runs the conversion of partitions in this process or in several of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any

from composer_path.conversion.input_scan import Partition
from composer_path.conversion.partition import ConvertJob, PartitionResult, Report, convert_partition
from composer_path.storage.places import StorageError

Task = tuple[ConvertJob, Partition]

_STOP, _RECORDS, _BYTES = range(3)


class Stopped(Exception):
    """Another process failed or the user interrupted; ends a worker's partition early."""


def run_locally(tasks: Iterable[Task], workers: int, report: Report) -> Iterator[PartitionResult]:
    """Convert partitions in ``workers`` processes; yields the results in the order of the tasks.

    Raises:
        StorageError: a place failed, or a process was killed.
    """
    if workers == 1:
        for job, partition in tasks:
            yield convert_partition(job, partition, report)
        return
    # Spawned, not forked: a fork of a process with threads (torch, a notebook) can hang.
    context = multiprocessing.get_context("spawn")
    shared = context.Array("q", 3)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (shared,))
    pending: deque[Future[PartitionResult]] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(_convert, task))
            if len(pending) >= 2 * workers:
                yield _next_result(pending, shared, report)
        while pending:
            yield _next_result(pending, shared, report)
    except BrokenProcessPool:
        raise StorageError(
            "a process of the conversion was killed, perhaps for lack of memory (then take fewer --workers); "
            "convert again with --resume"
        ) from None
    finally:
        shared[_STOP] = 1
        pool.shutdown(wait=True, cancel_futures=True)


def _next_result(pending: deque[Future[PartitionResult]], shared: Any, report: Report) -> PartitionResult:
    future = pending[0]
    while True:
        wait([future], timeout=0.2)
        with shared.get_lock():
            records, num_bytes = shared[_RECORDS], shared[_BYTES]
            shared[_RECORDS] = shared[_BYTES] = 0
        report(records, num_bytes)
        if future.done():
            pending.popleft()
            return future.result()
        for other in pending:  # an error is told at once, not when its turn comes
            if other.done() and other.exception() is not None:
                other.result()


_shared: Any = None


def _start_worker(shared: Any) -> None:
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is gone: nobody else would."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _convert(task: Task) -> PartitionResult:
    records = num_bytes = 0
    last = time.monotonic()

    def report(more_records: int, more_bytes: int) -> None:
        nonlocal records, num_bytes, last
        records, num_bytes = records + more_records, num_bytes + more_bytes
        if time.monotonic() - last > 0.2:
            flush()

    def flush() -> None:
        nonlocal records, num_bytes, last
        if _shared[_STOP]:
            raise Stopped
        with _shared.get_lock():
            _shared[_RECORDS] += records
            _shared[_BYTES] += num_bytes
        records, num_bytes, last = 0, 0, time.monotonic()

    result = convert_partition(*task, report)
    flush()
    return result
