"""What each Trainer's own work costs the host a step, nearly empty model: Composer's as we wire it, transformers'.

python -m benchmarks.host_work [--quick]

The same model, records and order in both, which log every step to TensorBoard. Counted is the CPU time of the training
thread and of those that write logs, from one step's end to the next, without the loader, the forward and backward
passes, the clipping and the optimizer's step, which both ask for alike. A run gives the median of its steps. Each run
has a process of its own, in an order that is shuffled anew each repetition; losses must agree, or nothing is written.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from benchmarks import end_to_end
from benchmarks.measure import UnequalError, paired_ratio, print_table, spread, write_result

TARGET = 3.0
NAMES = ("ours", "transformers")


class Shared:
    """CPU time of this thread in what both Trainers ask for alike."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.inside = False

    def count(self, owner: Any, name: str) -> None:
        """Count the calls of a function from now on; one within another is counted once."""
        function: Callable[..., Any] = getattr(owner, name)

        @wraps(function)
        def counted(*args: Any, **keywords: Any) -> Any:
            if self.inside:
                return function(*args, **keywords)
            self.inside, start = True, time.thread_time()
            try:
                return function(*args, **keywords)
            finally:
                self.inside = False
                self.seconds += time.thread_time() - start

        setattr(owner, name, counted)


class LogWriters:
    """CPU time of the threads that write TensorBoard's files."""

    def __init__(self) -> None:
        self.seconds_of: dict[threading.Thread, float] = {}  # of those that have ended, too

    def seconds(self) -> float:
        """So far."""
        for thread in threading.enumerate():
            if type(thread).__name__ == "_AsyncWriterThread" and thread.ident is not None:
                self.seconds_of[thread] = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        return sum(self.seconds_of.values())


def count_shared_work() -> Shared:
    """Count the loader, forward and backward passes, clipping and the optimizer's step of either Trainer."""
    import torch
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    from benchmarks.padded_step import PaddedModel
    from composer_path import ComposerPathMLLM

    shared = Shared()
    for owner, name in (
        (_BaseDataLoaderIter, "__next__"),
        (ComposerPathMLLM, "forward"),
        (PaddedModel, "forward"),
        (torch.Tensor, "backward"),
        (torch.nn.utils, "clip_grad_norm_"),
        (torch.optim.AdamW, "step"),
    ):
        shared.count(owner, name)
    step: Any = torch.optim.AdamW.step

    def step_after_closure(self: Any, closure: Callable[[], Any] | None = None) -> None:
        """Composer may hand over its passes as a closure: they are counted themselves."""
        if closure is not None:
            with torch.enable_grad():
                closure()
        step(self)

    torch.optim.AdamW.step = step_after_closure  # type: ignore[assignment,method-assign]
    return shared


def run_here(plan: dict[str, Any]) -> None:
    """What a run's own process does."""
    shared, writers = count_shared_work(), LogWriters()
    end_to_end.run_here(plan, lambda: time.thread_time() - shared.seconds + writers.seconds())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: few steps, one repetition; not written")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--name", default="host_work", help="of the result's file")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run:
        run_here(options.run)
        return 0
    size = {"steps": 4 if options.quick else 100, "shorter": 16}
    repetitions = 1 if options.quick else options.repetitions
    try:
        with tempfile.TemporaryDirectory() as folder:
            seconds, errors = end_to_end.compare(
                NAMES,
                "nearly empty",
                folder=Path(folder),
                repetitions=repetitions,
                module="benchmarks.host_work",
                measure="median_seconds_per_step",
                **size,
            )
    except UnequalError as error:
        print(error, file=sys.stderr)
        return 1
    own = {name: spread([1000 * value for value in values]) for name, values in seconds.items()}
    ratio = paired_ratio(seconds["ours"], seconds["transformers"])
    rows = [(name, own[name]["median"], own[name]["lowest"], own[name]["highest"]) for name in NAMES]
    print_table(("Trainer", "its own ms a step", "lowest", "highest"), rows)
    print(f"ours over transformers: {ratio['median']:.2f}")
    if options.quick:
        return 0
    result = {
        "threads": 1,
        "target": TARGET,
        "settings": {**size, "repetitions": repetitions, "batch_size": 8, "loader_workers": 0},
        "own_ms_per_step": own,
        "ours_over_transformers": ratio,
        "largest_relative_loss_error": errors,
    }
    write_result(options.name, result)
    if ratio["median"] > TARGET:
        print(f"above the target of {TARGET}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
