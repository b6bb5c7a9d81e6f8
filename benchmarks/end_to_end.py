"""Our whole road against transformers' Trainer on the same weights, records and order, on one CPU thread.

python -m benchmarks.end_to_end [--quick]

Ours: MDS shards, `composer_path.train.train`, Composer's Trainer. Theirs: one JSON read lazily, a padded collator,
transformers' Trainer, with and without gradient checkpointing. Each run has a process of its own; the order of the runs
is shuffled anew each repetition. All losses must agree to 1e-4, or nothing is written. What
each Trainer itself costs is measured by host_work.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import (
    UnequalError,
    interleaved,
    paired_ratio,
    print_table,
    require_equal,
    spread,
    write_result,
)

REPOSITORY = Path(__file__).resolve().parent.parent
TARGET = 1.3
TOLERANCE = 1e-4
WHOLE = ("ours", "transformers", "transformers, checkpointing")


def run_in_process(
    name: str, model: str, steps: int, shorter: int, folder: Path, at: int, module: str
) -> dict[str, Any]:
    """One run in a fresh process, unless it lies in the folder already; what it reports."""
    place = folder / f"run-{model}-{at}-{name}".replace(" ", "_").replace(",", "")
    if (place / "report.json").exists():
        return json.loads((place / "report.json").read_text(encoding="utf-8"))
    plan = {"name": name, "model": model, "steps": steps, "shorter": shorter}
    plan |= {"data": str(folder / f"data-{model}".replace(" ", "_")), "place": str(place)}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.run(
        [sys.executable, "-m", module, "--run", json.dumps(plan)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise SystemExit(f"the run '{name}' failed:\n{process.stderr[-4000:]}")
    return json.loads((place / "report.json").read_text(encoding="utf-8"))


def run_here(plan: Mapping[str, Any], now: Callable[[], float] = time.process_time) -> None:
    """What a run's own process does; `now` is the clock of its steps."""
    import torch

    from benchmarks.instruction_set import write_instruction_set
    from benchmarks.trainer_runs import run_by_name, run_config

    torch.set_num_threads(1)
    place = Path(plan["place"])
    place.mkdir(parents=True, exist_ok=True)  # an interrupted run starts again
    data = write_instruction_set(Path(plan["data"]), 8 * plan["steps"], plan["shorter"])
    config = run_config(data, plan["model"], plan["steps"], place)
    report = run_by_name(plan["name"], config, data.data, place / "transformers", now)
    (place / "report.json").write_text(json.dumps(report), encoding="utf-8")


def compare(
    names: Sequence[str],
    model: str,
    *,
    steps: int,
    shorter: int,
    repetitions: int,
    folder: Path,
    module: str = "benchmarks.end_to_end",
    measure: str = "seconds_per_step",
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds per step of each run, by repetition, and its largest relative loss error against the first run.

    Raises:
        UnequalError: A step's losses differ.
    """
    seconds: dict[str, list[float]] = {name: [] for name in names}
    errors = dict.fromkeys(names, 0.0)
    expected: dict[str, float] | None = None
    for repetition, name in interleaved(names, repetitions):
        report = run_in_process(name, model, steps, shorter, folder, repetition, module)
        losses = numbered(report["losses"])
        expected = losses if expected is None else expected
        errors[name] = max(errors[name], *require_equal(name, losses, expected, TOLERANCE).values())
        seconds[name].append(report[measure])
    return seconds, errors


def numbered(losses: Sequence[float]) -> dict[str, float]:
    """Losses by step."""
    return {f"loss of step {step}": loss for step, loss in enumerate(losses)}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: few steps, one repetition; not written")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--folder", help="keep runs here; an interrupted command goes on with those that are missing")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run:
        run_here(options.run)
        return 0
    quick = options.quick
    repetitions = 1 if quick else options.repetitions
    whole = {"steps": 3 if quick else 20, "shorter": 16 if quick else 4, "repetitions": repetitions}
    names = WHOLE[:2] if quick else WHOLE
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(options.folder or temporary)
            times, errors = compare(names, "small", folder=folder, **whole)
    except UnequalError as error:
        print(error, file=sys.stderr)
        return 1
    speeds = {name: paired_ratio(times[name], times["ours"]) for name in names}
    rows = [
        (name, 1000 * spread(times[name])["median"], speeds[name]["median"], f"{errors[name]:.0e}") for name in names
    ]
    print_table(("run", "ms a step", "ours is faster by", "largest error"), rows)
    if quick:
        return 0
    write_result(
        "end_to_end",
        {
            "threads": 1,
            "target": TARGET,
            "settings": {**whole, "batch_size": 8, "loader_workers": 0},
            "speed_of_ours_over": {name: speeds[name] for name in names if name != "ours"},
            "cpu_seconds_per_step": {name: spread(found) for name, found in times.items()},
            "largest_relative_loss_error": errors,
        },
    )
    if speeds["transformers"]["median"] < TARGET:
        print(f"below the target of {TARGET}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
