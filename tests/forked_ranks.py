"""Ranks that a test forks, whatever the test's own process belongs to."""

from __future__ import annotations

import os
from typing import Any

import torch

_inherited: list[Any] = []  # never freed: a forked process lacks the threads that it would wait for


def join_two_ranks(rank: int, port: int) -> None:
    """Make this forked process one of two ranks on gloo; it leaves the group that the test's process may be in."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    if torch.distributed.is_initialized():
        _inherited.append(torch.distributed.group.WORLD)
        torch.distributed.destroy_process_group()
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
