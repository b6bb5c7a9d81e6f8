"""Runs of several processes, started by Composer's launcher once for all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_run import REPO_ROOT, end_group
from warm_process import popen


@dataclass(frozen=True)
class Launched:
    """What the runs of a launch left: for each that ended the notes of each rank."""

    notes: dict[str, list[dict[str, Any]]]
    output: str
    returncode: int
    left_over: bool


def launch(ranks: int, script: str, legs: Sequence[dict[str, Any]], shards: Path, folder: Path) -> Launched:
    """Make the legs' runs in turn in so many processes.

    Args:
        ranks: How many.
        script: Of tests/, which takes the plan.
        legs: What `two_ranks.make_run` takes.
        shards: Of `convert_shards`.
        folder: Each run's `save_root` lies in it, by the leg's name.
    """
    for leg in legs:
        leg["overrides"].append("trainer.dist_timeout=120")  # a hang is then an error
    plan = folder / f"plan_{ranks}.json"
    places = {"shards": str(shards), "root": str(folder), "out": str(folder)}
    plan.write_text(json.dumps(places | {"legs": legs, "first_shared_memory": 100_000 + os.getpid() % 800_000}))
    command = [str(Path(sys.executable).parent / "composer"), "-n", str(ranks), str(REPO_ROOT / "tests" / script)]
    process = popen(
        [*command, str(plan)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=400)
    finally:
        left_over = end_group(process.pid)
    files = {leg["name"]: [folder / f"{leg['name']}-rank{rank}.pt" for rank in range(ranks)] for leg in legs}
    notes = {name: list(map(torch.load, of)) for name, of in files.items() if all(file.exists() for file in of)}
    return Launched(notes, output, process.returncode, left_over)
