"""Claims about the number under which shared memory stands: runs that start together never take the same one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from s3_server import free_port
from streaming.base.constant import BARRIER, LOCALS
from streaming.base.shared import SharedMemory
from streaming.base.shared.prefix import _get_path
from streaming.base.world import World
from tiny_shards import NUM_SAMPLES, build_loader, read_epoch, write_set
from warm_process import popen

from composer_path.stream.shared_prefix import register_prefix

TAKE = """
import json, os, sys, time
import torch
from streaming.base.constant import TICK
from streaming.base.shared import prefix
from streaming.base.world import World
from composer_path.stream.shared_prefix import register_prefix

if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo")
print("ready", flush=True)
sys.stdin.readline()
world, taken, errors = World.detect(), [], 0
for turn in range({turns}):
    if world.rank == 1:
        time.sleep(0.02)  # look later than rank 0 does
    number, memory = {pick}([f"/nowhere/{{os.getppid()}}/{{turn}}"], [None], world)
    taken.append((time.monotonic(), number))
    time.sleep(0.002)
    taken.append((time.monotonic(), number))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    memory.cleanup()
print(json.dumps(taken), flush=True)
"""

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start(pick: str = "register_prefix", turns: int = 100, **environment: str) -> subprocess.Popen:
    words = [sys.executable, "-c", TAKE.format(pick=pick, turns=turns)]
    pipe = subprocess.PIPE
    # A training run in this very process leaves its rank in the environment.
    inherited = {key: value for key, value in os.environ.items() if key not in RANKS}
    return popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env={**inherited, **environment})


def finish(runs: list[subprocess.Popen]) -> list[list[tuple[float, int]]]:
    """Let all begin at the same moment; what each took and when, two entries a turn."""
    try:
        for run in runs:
            assert run.stdout is not None and run.stdout.readline() == "ready\n", run.communicate()[1]
        for run in runs:
            assert run.stdin is not None
            run.stdin.write("\n")
            run.stdin.flush()
        found = []
        for run in runs:
            output, errors = run.communicate(timeout=60)
            assert run.returncode == 0, errors
            found.append(json.loads(output.splitlines()[-1]))
        return found
    finally:
        for run in runs:
            run.kill()


def test_two_runs_that_start_together_take_two_numbers() -> None:
    first, second = finish([start(), start()])
    for (begin, number), (end, _) in zip(first[::2], first[1::2], strict=True):
        assert number not in {other for moment, other in second if begin <= moment <= end}


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_ranks_take_their_leaders_number_though_other_runs_come_and_go(tmp_path: Path) -> None:
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [start(turns=30, RANK=rank, LOCAL_RANK=rank, **world) for rank in "01"]
    ours, theirs, _ = finish([*ranks, start(turns=150)])
    assert [number for _, number in ours] == [number for _, number in theirs]


def left_by_a_run() -> dict[int, SharedMemory]:
    """Remains under the next two numbers that nobody has; other programs of this machine take and leave some, too."""
    number, free = register_prefix(["/nowhere/else"], [None], World.detect())
    free.cleanup()
    remains: dict[int, SharedMemory] = {}
    for name in (BARRIER, LOCALS):  # the folders are gone and the barrier stays, and the other way round
        while number not in remains:
            try:
                remains[number] = SharedMemory(_get_path(number, name), True, 8)
            except FileExistsError:
                number += 1
        number += 1
    return remains


def test_the_remains_of_a_run_that_ended_half_way_are_passed_over(tmp_path: Path) -> None:
    """Streaming's own choice, the largest of each name's first free number, may be taken."""
    remains = left_by_a_run()
    try:
        loader = build_loader(local=str(write_set(tmp_path)))
        assert sorted(read_epoch(loader)) == list(range(NUM_SAMPLES))
        assert loader.dataset._shm_prefix_int not in remains
    finally:
        for memory in remains.values():
            memory.cleanup()
