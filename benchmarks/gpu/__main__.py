"""Trains a 7B of random weights on one GPU, in our ways and in others'; `--tiny` runs every line on a CPU.

Each piece of work is a process with a time of its own, and its result is written when it ends, to `gpu.json`: a call
leaves out what lies there already, so that calls of ten minutes each make the whole. First losses and gradients must
agree before a rate is reported. The exit code is 1 unless everything that was asked for is there and right.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.jobs import Job, Results, run_job
from benchmarks.gpu.variants import (
    BASELINE,
    BATCH,
    LONGEST,
    REPOSITORY,
    VARIANTS,
    YAMLS,
    overrides,
    peer_recomputes,
    row_tokens,
)
from benchmarks.gpu.verdict import NEEDS_CUDA, job_name, judge, problems, show
from benchmarks.measure import RESULTS

FUSIONS = {"off": False, "liger": True, "compile": True}  # and whether a CPU can't run it


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The options; without a choice, everything is chosen."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, help="folder; by default benchmarks/results, of --tiny the scratch one")
    parser.add_argument("--scratch", type=Path, default=REPOSITORY / "runs" / "gpu", help="for weights, sets and runs")
    parser.add_argument("--tiny", action="store_true", help="small sizes that a CPU runs")
    parser.add_argument("--stage", action="append", choices=list(YAMLS), help="ceilings and this stage; repeatable")
    named = [name for name, variant in VARIANTS.items() if variant.chosen]
    parser.add_argument("--variants", default=",".join(named), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--cells", action="store_true", help="gradients of fusion and checkpointing in all cells")
    parser.add_argument("--loader", action="store_true", help="the loader alone")
    parser.add_argument("--save", action="store_true", help="a checkpoint and the weights handed on")
    parser.add_argument("--again", action="store_true", help="also what has a result")
    parser.add_argument("--minutes", type=float, default=9.5, help="of the whole call")
    parser.add_argument("--seconds", type=float, default=240, help="of each piece of work")
    parser.add_argument("--steps", type=int, help="that are measured: 8, or 2 of --tiny")
    parser.add_argument("--skip", type=int, help="first steps that aren't: 3, or 1 of --tiny")
    parser.add_argument("--row-tokens", type=int, help="of the largest row, in place of what plan allows")
    options = parser.parse_args(words)
    options.variants = options.variants.split(",")
    if unknown := [name for name in options.variants if name not in VARIANTS]:
        parser.error(f"--variants: unknown {', '.join(unknown)}; choose of {', '.join(VARIANTS)}")
    if not (options.stage or options.cells or options.loader or options.save):
        options.stage, options.cells, options.loader, options.save = list(YAMLS), True, True, True
    options.stage = options.stage or []
    options.steps = options.steps or (2 if options.tiny else 8)
    options.skip = options.skip or (1 if options.tiny else 3)
    if options.steps < 1 or options.skip < 1:
        parser.error("--steps, --skip: must be at least 1")
    options.scratch = options.scratch.resolve()
    options.again |= options.tiny and options.results is None  # a try of every line, not a result to keep
    options.results = (options.results or (options.scratch / "results" if options.tiny else RESULTS)).resolve()
    return options


def stage_task(options: argparse.Namespace, prepared: dict[str, Any], stage: str, name: str) -> dict[str, Any]:
    """A run of a stage in a variant, with rows as `plan` allows, or as long as the longest sample."""
    variant, facts = VARIANTS[name], prepared["stages"][stage]
    steps, run_name = options.steps + options.skip, f"stage_{stage}_{name}"
    words = [
        *overrides(stage, options.tiny, facts["places"], steps),
        f"trainer.run_name={run_name}",
        f"train_loader.max_tokens_per_microbatch={max(rows_of(options, prepared, stage, name), LONGEST)}",
        f"execution.activation_checkpointing={variant.checkpointing}",
        *variant.execution,
    ]
    return {
        "work": variant.work,
        "yaml": str(REPOSITORY / "yamls" / f"{YAMLS[stage]}.yaml"),
        "overrides": words,
        "steps": steps,
        "skip": options.skip,
        "checkpointing": variant.checkpointing,
        "facts": facts,
        "recomputes": peer_recomputes(prepared, stage, BATCH[stage]),
        "folder": str(options.scratch / "runs" / run_name),
    }


def rows_of(options: argparse.Namespace, prepared: dict[str, Any], stage: str, name: str) -> int:
    """Tokens of a variant's largest row."""
    return options.row_tokens or row_tokens(VARIANTS[name], prepared, stage)


def not_run(options: argparse.Namespace, prepared: dict[str, Any], stage: str, name: str) -> str | None:
    """Why a variant can't run on this machine, or None."""
    variant, rows = VARIANTS[name], rows_of(options, prepared, stage, name)
    if variant.needs_cuda and prepared["gpu"] is None:
        return NEEDS_CUDA
    if variant.work != "peer" and rows < LONGEST:
        return f"plan: rows of {rows} tokens fit in {prepared['memory'] / 1e9:.0f} GB, fewer than {LONGEST}"
    return None


def chosen_jobs(options: argparse.Namespace, prepared: dict[str, Any]) -> list[Job]:
    """What the call asks for, in its order: what compiles comes last."""
    jobs = [Job("ceilings", {"work": "ceilings", "tiny": options.tiny})] if options.stage else []
    chosen = {BASELINE, *options.variants}  # nothing is compared without it
    asked = (options, prepared)
    for stage in options.stage:
        for name in (name for name in VARIANTS if name in chosen):
            jobs.append(Job(job_name(stage, name), stage_task(*asked, stage, name), not_run(*asked, stage, name)))
    for fusion, needs_cuda in FUSIONS.items() if options.cells else ():
        why = NEEDS_CUDA if needs_cuda and prepared["gpu"] is None else None
        jobs.append(Job(f"cells: {fusion}", {"work": "cells", "fusion": fusion}, why))
    stages = {stage: stage_task(*asked, stage, BASELINE) for stage in prepared["stages"]}
    if options.loader:
        jobs.append(Job("loader", {"work": "loader", "stages": stages}))
    for stage, task in stages.items() if options.save else ():
        jobs.append(Job(f"save: stage {stage}", task | {"work": "save"}, not_run(*asked, stage, BASELINE)))
    return sorted(jobs, key=lambda job: job.name.endswith("compile"))  # stable


def prepare(options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What the runs share; taken from an earlier call where it holds all that is needed."""
    stages = options.stage or list(YAMLS)
    path = options.scratch / "prepared.json"
    if options.tiny and options.again:
        path.unlink(missing_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {"tiny": options.tiny, "stages": {}}
    if found["tiny"] != options.tiny:
        shutil.rmtree(options.scratch / "language_model", ignore_errors=True)
        shutil.rmtree(options.scratch / "sets", ignore_errors=True)
        found = {"tiny": options.tiny, "stages": {}}
    if set(stages) <= found["stages"].keys():
        return found
    stages = sorted({*stages, *found["stages"]})
    steps = options.steps + options.skip
    task = {"work": "prepare", "scratch": str(options.scratch), "tiny": options.tiny, "stages": stages, "steps": steps}
    return run_job(Job("prepare", task), options.scratch, seconds, options.results / "gpu.log")


def main(words: Sequence[str] | None = None) -> int:
    """Everything that is chosen and has no result yet; 1 if something is missing or wrong."""
    options = parse(words)
    end = time.monotonic() + 60 * options.minutes
    options.results.mkdir(parents=True, exist_ok=True)
    results = Results.of(options.results)
    prepared = prepare(options, 60 * options.minutes)
    if "failed" in prepared:
        print(f"prepare: {prepared['failed']}", file=sys.stderr)
        return 1
    about = {key: prepared[key] for key in ("gpu", "tiny", "memory", "peak")}
    for key in ("gpu", "tiny"):
        if results.jobs and results.about.get(key) != about[key]:
            found = f"found results of {key} {results.about.get(key)!r}, this is {about[key]!r}; take another folder"
            print(f"--results {options.results}: must hold results of one machine; {found}", file=sys.stderr)
            return 1
    results.about |= about | {"shared_memory_gb": shared_memory() / 1e9}
    results.about["plans"] = results.about.get("plans", {}) | prepared["stages"]
    jobs = chosen_jobs(options, prepared)
    for job in jobs:
        if results.has(job.name) and not options.again:
            continue
        seconds = min(options.seconds, end - time.monotonic())
        results.jobs[job.name] = report = run_job(job, options.scratch, seconds, options.results / "gpu.log")
        why = next((f": {report[key]}" for key in ("failed", "not_run") if key in report), "")
        print(f"{job.name} {'not run here' if 'not_run' in report else 'ended'}{why}", flush=True)
        results.write()
    for stage in YAMLS:
        judge(results, stage)
    results.write()
    if options.tiny:
        print("small sizes: rates say nothing, errors do")
    show(results, options.stage)
    wrong = problems(results, [job.name for job in jobs])
    for name, why in wrong.items():
        print(f"{name}: {why}", file=sys.stderr)
    return 1 if wrong else 0


def shared_memory() -> float:
    """Bytes of /dev/shm, through which the loader's workers send; 0 where there is none."""
    return float(shutil.disk_usage("/dev/shm").total) if Path("/dev/shm").is_dir() else 0.0


if __name__ == "__main__":
    sys.exit(main())
