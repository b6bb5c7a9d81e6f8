"""What four processes do for test_hybrid_sharding.py: `composer -n 4 four_ranks.py PLAN.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from two_ranks import make_run, number_shared_memory_from


def give_events_to_cpus() -> None:
    """Let FSDP2 of torch 2.7 reduce over replicas on CPUs: it waits for events, which their streams have none of."""
    if torch.__version__ < "2.8":
        torch.accelerator.current_stream = torch.cpu.current_stream  # type: ignore[assignment]
        torch.cpu.Stream.record_event = lambda stream: torch.cpu.Event()  # type: ignore[method-assign,return-value]


if __name__ == "__main__":
    torch.set_num_threads(1)
    give_events_to_cpus()
    the_plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    number_shared_memory_from(the_plan["first_shared_memory"])
    for the_leg in the_plan["legs"]:
        make_run(the_plan, the_leg)
