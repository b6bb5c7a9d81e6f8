"""A tiny run that goes wrong as told: `[composer -n 2] faulty_run.py PLAN.json` ends as `composer-path train` does.

The plan: `stage`, `shards`, `root`, `overrides`, and `fault`, the name of a function here with `rank` and `step` of the
step in which it strikes; `slow` seconds are added to each step from `slow_from` on, and to each batch of an
evaluation.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from composer.core import Algorithm, Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist
from tiny_run import load_tiny_config, load_tokenizer_once
from warm_process import popen

from composer_path.commands.verb import exit_code
from composer_path.records import vocabulary

LAUNCHERS = {"composer": "composer.cli.launcher", "ours": "composer_path.guards.launch"}
BARE = ("model.projector.weights=null", "eval_loader=null", "callbacks=null", "trainer.max_duration=6ba")


@dataclass
class Outcome:
    """How a run ended."""

    code: int
    seconds: float  # from the last signal, or the start, to its end
    stdout: str
    stderr: str
    folder: Path  # of the run
    losses: dict[str, float]  # by step, of all starts so far


def go(
    root: Path,
    shards: Path,
    overrides: Sequence[str] = (),
    ranks: int = 1,
    signals: Sequence[tuple[str, int, str]] = (),
    launcher: str = "composer",
    **plan: Any,
) -> Outcome:
    """Start a plan, and wait for its end.

    Args:
        signals: Each a note after which it is sent (`batch_start-<rank>-<step>`, or `+` seconds), its number, and to
            whom: the `leader`, which is the launcher where there is one, or the whole `group`.
    """
    root.mkdir(parents=True, exist_ok=True)
    whole = {"stage": "finetune", "shards": str(shards), "root": str(root), "overrides": [*BARE, *overrides], **plan}
    (root / "plan.json").write_text(json.dumps(whole), encoding="utf-8")
    for note in (root / "notes").glob("*_start-*"):
        note.unlink()
    words = [__file__, str(root / "plan.json")]
    started = ["-m", LAUNCHERS[launcher], "-n", str(ranks)] if ranks > 1 else []
    with open(root / "stdout", "w") as out, open(root / "stderr", "w") as err:
        process = popen([sys.executable, *started, *words], stdout=out, stderr=err, start_new_session=True)
        start = time.monotonic()
        try:
            for note, number, whom in signals:
                if note[0] == "+":
                    time.sleep(float(note))
                while note[0] != "+" and process.poll() is None and not (root / "notes" / note).exists():
                    time.sleep(0.02)
                if process.poll() is None:
                    (os.killpg if whom == "group" else os.kill)(process.pid, number)
                    start = time.monotonic()
            code = process.wait(120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    seconds = time.monotonic() - start
    losses = root / "notes" / "losses-0.json"
    return Outcome(
        code,
        seconds,
        (root / "stdout").read_text(),
        (root / "stderr").read_text(),
        root / "finetune",
        json.loads(losses.read_text()) if losses.exists() else {},
    )


class Fault(Algorithm):
    """Strikes on one rank in one step; as an algorithm it comes before all callbacks."""

    def __init__(self, fault: str | None, rank: int, step: int, notes: Path, slow: float, slow_from: int) -> None:
        self.fault, self.rank, self.step, self.notes = fault, rank, step, notes
        self.slow, self.slow_from = slow, slow_from

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.AFTER_LOSS, Event.AFTER_TRAIN_BATCH, Event.BATCH_START, Event.EVAL_BATCH_START)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        step = state.timestamp.batch.value + 1
        here = dist.get_global_rank() == self.rank and step == self.step
        if event in (Event.BATCH_START, Event.EVAL_BATCH_START):
            (self.notes / f"{event.value}-{dist.get_global_rank()}-{step}").touch()
            time.sleep(self.slow if step >= self.slow_from else 0)
        elif here and self.fault is not None:
            globals()[self.fault](event, state)


def nan_loss(event: Event, state: State) -> None:
    if event == Event.AFTER_LOSS:
        state.loss = state.loss * float("nan")


def nan_gradient(event: Event, state: State) -> None:
    if event == Event.AFTER_TRAIN_BATCH:
        gradient: Any = next(p.grad for p in state.model.parameters() if p.grad is not None and p.grad.numel())
        (gradient.to_local() if hasattr(gradient, "to_local") else gradient).view(-1)[:1] = torch.inf


def error(event: Event, state: State) -> None:
    raise RuntimeError("a bug on purpose")


def mistake(event: Event, state: State) -> None:
    from composer_path.stream.error import StreamError

    raise StreamError.of("shard.00000.mds", "hash", "a/set", "another hash", "convert the data again")


def hang(event: Event, state: State) -> None:
    time.sleep(1000)


def nan_weight(event: Event, state: State) -> None:
    if event == Event.AFTER_TRAIN_BATCH:
        weight: Any = next(p for p in state.model.parameters() if p.grad is not None and p.numel())
        with torch.no_grad():
            (weight.to_local() if hasattr(weight, "to_local") else weight).view(-1)[:1] = torch.nan


def killed(event: Event, state: State) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def frozen_worker(event: Event, state: State) -> None:
    for worker in workers():
        worker.suspend()


def killed_worker(event: Event, state: State) -> None:
    for worker in workers():
        worker.kill()
    time.sleep(5)  # torch's handler of SIGCHLD raises here


def workers() -> list[psutil.Process]:
    return [one for one in psutil.Process().children() if "resource_tracker" not in " ".join(one.cmdline())]


def stopped(event: Event, state: State) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


class Losses(Callback):
    """Notes the losses."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def batch_end(self, state: State, logger: Logger) -> None:
        self.losses[state.timestamp.batch.value] = float(state.total_loss_dict["loss/train/total"])


def work(plan: dict[str, Any]) -> int:
    from composer_path.train import train

    logging.basicConfig(level=logging.WARNING)
    vocabulary.load_tokenizer = load_tokenizer_once
    config = load_tiny_config(plan["stage"], Path(plan["shards"]), Path(plan["root"]), plan["overrides"])
    notes, losses = Path(plan["root"]) / "notes", Losses()
    notes.mkdir(parents=True, exist_ok=True)
    fault = Fault(
        plan.get("fault"),
        plan.get("rank", 0),
        plan.get("step", 2),
        notes,
        plan.get("slow", 0.0),
        plan.get("slow_from", 1),
    )
    try:
        train(config, algorithms=[fault], callbacks=[losses])
    finally:
        out = notes / f"losses-{os.environ.get('RANK', '0')}.json"
        known = json.loads(out.read_text()) if out.exists() else {}
        out.write_text(json.dumps(known | {str(step): loss for step, loss in losses.losses.items()}))
    return 0


if __name__ == "__main__":
    the_plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.exit(exit_code(lambda: work(the_plan), "train"))
