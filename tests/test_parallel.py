"""A parallel map gives results in order, takes few items ahead, tells errors at once and stops when nobody asks."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from composer_path.parallel import ProcessKilled, Report, in_processes, in_threads


def counted(taken: list[int], count: int) -> Iterator[int]:
    for number in range(count):
        taken.append(number)
        yield number


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_give_results_in_order_and_take_few_items_ahead(workers: int) -> None:
    taken: list[int] = []

    def slower_at_first(number: int) -> int:
        time.sleep(0.001 * (20 - number))
        return -number

    results = in_threads(slower_at_first, counted(taken, 20), workers, ahead=5)
    assert [next(results) for _ in range(3)] == [0, -1, -2]
    assert len(taken) <= 3 + 5
    assert list(results) == [-number for number in range(3, 20)]


def test_an_error_is_told_before_its_turn_and_ends_the_work() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        if number == 1:
            raise ValueError("the second")
        for _ in range(100):
            if number == 0 and not done:
                time.sleep(0.02)
        done.append(number)

    taken: list[int] = []
    with pytest.raises(ValueError, match="the second"):
        list(in_threads(work, counted(taken, 1000), 2))
    assert len(taken) < 20


@pytest.mark.parametrize("map_items", [in_threads, lambda *words: in_processes(*words, fork=True)])
def test_who_stops_asking_stops_the_work(map_items: Callable[..., Iterator[int]]) -> None:
    results = map_items(abs, range(-10_000, 0), 2)
    assert next(results) == 10_000
    results.close()
    assert list(results) == []


def tell(number: int, report: Report) -> int:
    for _ in range(number):
        report(1, 10)
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_what_all_processes_have_done_is_added_up(workers: int) -> None:
    told: list[tuple[int, int]] = []
    results = in_processes(tell, range(9), workers, lambda *counts: told.append(counts), fork=True)
    assert list(results) == list(range(9))
    assert [sum(column) for column in zip(*told, strict=True)] == [36, 360]


def fail(number: int) -> int:
    if number == 1:
        raise OSError("no such disk")
    time.sleep(0 if number else 1)
    return number


def die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_an_error_or_the_death_of_a_process_is_told() -> None:
    start = time.monotonic()
    with pytest.raises(OSError, match="no such disk"):
        list(in_processes(fail, range(4), 2, fork=True))
    assert time.monotonic() - start < 30
    with pytest.raises(ProcessKilled, match=r"a process was killed, perhaps for lack of memory \(then take fewer"):
        list(in_processes(die, range(40), 2, fork=True))


FORKS = """
import os, time
from composer_path.parallel import in_processes
def work(number):
    os.write(1, f"{os.getpid()}\\n".encode())  # in one piece, whatever Python does with its streams
    time.sleep(60)
list(in_processes(work, range(2), 2, fork=True))
"""


def test_processes_end_with_a_parent_that_was_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", FORKS], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in workers if os.path.exists(f"/proc/{pid}")] == []
    parent.stdout.close()


MAPPED = """
import ctypes
from composer_path.parallel import keep_freed_memory
libc = ctypes.CDLL(None)
class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in "arena ordblks smblks mapped b c d e f g".split()]
libc.mallinfo.restype, libc.malloc.restype = Mallinfo, ctypes.c_void_p
for step in (lambda: None, keep_freed_memory):
    step()
    before = libc.mallinfo().mapped
    libc.malloc(8 * 2**20)
    print(libc.mallinfo().mapped - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_a_process_that_keeps_freed_memory_takes_an_image_from_its_heap() -> None:
    run = subprocess.run([sys.executable, "-c", MAPPED], stdout=subprocess.PIPE, text=True, check=True)
    assert run.stdout.split() == ["1", "0"]
