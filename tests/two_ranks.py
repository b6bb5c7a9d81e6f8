"""What two processes do for test_sharding.py: `composer -n 2 two_ranks.py PLAN.json` makes the plan's runs in turn."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist
from tiny_run import Witness, load_tiny_config, run, weights_of
from torch.distributed.tensor import DTensor

from composer_path import train as road


class DyingWitness(Witness):
    """Kills rank 1 in the second step, as a machine's failure would."""

    def batch_start(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == 1 and dist.get_global_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def make_run(plan: dict[str, Any], leg: dict[str, Any]) -> None:
    """One run; each rank notes what it saw in `<name>-rank<rank>.pt`."""
    build_model, mend = road.build_model, None
    starts: list[set[str]] = []

    def build_and_look(*given: Any) -> Any:
        model = build_model(*given)
        starts.append({parameter.device.type for parameter in model.parameters()})
        return model

    road.build_model = build_and_look  # type: ignore[assignment]
    if leg.get("unmended"):
        from composer_path.run import sharding

        mend, sharding.mend_gloo_averaging = sharding.mend_gloo_averaging, lambda: False  # type: ignore[assignment]
    try:
        config = load_tiny_config(
            leg["stage"], Path(plan["shards"]), Path(plan["root"]) / leg["name"], leg["overrides"]
        )
        trainer, witness = run(config, DyingWitness() if leg.get("dies") else Witness())
    finally:
        road.build_model = build_model
        if mend is not None:
            sharding.mend_gloo_averaging = mend
    notes = witness.notes() | {"weights": weights_of(trainer), "started_on": starts[0]}
    notes["laid_out"] = {
        (str(parameter.placements), str(parameter.device_mesh.mesh.tolist()))
        for parameter in trainer.state.model.parameters()
        if isinstance(parameter, DTensor)
    }
    torch.save(notes, Path(plan["out"]) / f"{leg['name']}-rank{dist.get_global_rank()}.pt")


def number_shared_memory_from(first: int) -> None:
    """Keep clear of other processes on this machine: Streaming's ranks each look for the first free number."""
    from streaming.base.shared import prefix

    prefix._each_prefix_int = lambda: itertools.count(first)


if __name__ == "__main__":
    the_plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    number_shared_memory_from(the_plan["first_shared_memory"])
    for the_leg in the_plan["legs"]:
        make_run(the_plan, the_leg)
