"""A tiny run that kills itself as told: `[composer -n 2] soak_run.py PLAN.json`.

The plan: `stage`, `shards`, `root`, `overrides`, `notes` (a folder), `pause` (seconds that each step takes longer), and
`kill`: null, or [moment, number]: the whole process group gets SIGKILL at the so-manieth call of that moment:
`write`, `fsync` or `rename` (which of them in a checkpoint's save), `evaluation` (a batch of one), `epoch` (an end of
one), `step` (when so many steps are done and saved); `fill` fills the disk in that save.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from composer.core import Callback, State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist
from tiny_run import load_tiny_config, load_tokenizer_once

from composer_path.checkpoints.saver import CheckpointSaver
from composer_path.commands.verb import exit_code
from composer_path.records import vocabulary


class Killer(Callback):
    """Counts moments, and ends the process group at the one that is meant."""

    def __init__(self, moment: str, number: int) -> None:
        self.moment, self.left, self.saving = moment, number, False
        self.saves = 0
        if moment in ("write", "fsync", "rename", "fill"):
            self._watch_saves()

    def now(self, moment: str) -> None:
        if moment == self.moment and dist.get_global_rank() == 0:
            self.left -= 1
            if self.left == 0:
                os.killpg(os.getpgid(0), signal.SIGKILL)

    def _watch_saves(self) -> None:
        save, opened = CheckpointSaver.save, io.open

        def watched_save(saver: CheckpointSaver, state: State, logger: Logger) -> None:
            self.saving, self.saves = True, self.saves + 1
            try:
                save(saver, state, logger)
            finally:
                self.saving = False

        def watched(name: str, original: Any) -> Any:
            def call(*arguments: Any, **keywords: Any) -> Any:
                if self.saving:
                    self.now(name)
                return original(*arguments, **keywords)

            return call

        def watched_open(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            stream = opened(file, mode, *rest, **more)
            if self.saving and "w" in mode:
                if self.moment == "fill" and self.saves == self.left and str(file).endswith(".distcp"):
                    fill(Path(str(file)).parent)
                self.now("write")
            return stream

        CheckpointSaver.save = watched_save  # type: ignore[method-assign]
        os.fsync, os.replace = watched("fsync", os.fsync), watched("rename", os.replace)
        Path.rename = watched("rename", Path.rename)  # type: ignore[method-assign]
        io.open = builtins.open = watched_open  # type: ignore[assignment]

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        self.now("evaluation")

    def epoch_end(self, state: State, logger: Logger) -> None:
        self.now("epoch")

    def batch_start(self, state: State, logger: Logger) -> None:
        if self.moment == "step" and state.timestamp.batch.value == self.left:
            os.killpg(os.getpgid(0), signal.SIGKILL)


def fill(folder: Path) -> None:
    """Leave no room on a disk."""
    usage = os.statvfs(folder)
    with open(folder.parent / "filler", "wb") as file:
        file.write(bytes(max(0, usage.f_bavail * usage.f_frsize - 100_000)))


class Notes(LoggerDestination):
    """A line for each step: its samples on this rank, and its loss."""

    def __init__(self, folder: Path, pause: float) -> None:
        self.folder, self.pause, self.ids = folder, pause, []  # type: ignore[var-annotated]

    def batch_start(self, state: State, logger: Logger) -> None:
        self.ids = sorted(state.batch.sample_ids.tolist())
        (self.folder / f"step-{state.timestamp.batch.value}").touch()
        time.sleep(self.pause)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if "loss/train/total" in metrics:
            line = {"step": step, "ids": self.ids, "loss": float(metrics["loss/train/total"])}
            with open(self.folder / f"rank{dist.get_global_rank()}.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")


def main(plan: dict[str, Any]) -> int:
    """Train as the plan says; the exit code is that of `composer-path train`."""
    from composer_path.train import train

    config = load_tiny_config(plan["stage"], Path(plan["shards"]), Path(plan["root"]), plan["overrides"])
    kill = [Killer(*plan["kill"])] if plan["kill"] else []
    with mock.patch.object(vocabulary, "load_tokenizer", load_tokenizer_once):
        train(config, callbacks=kill, loggers=[Notes(Path(plan["notes"]), plan["pause"])])
    return 0


if __name__ == "__main__":
    import itertools
    import logging

    from streaming.base.shared import prefix

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("composer_path").setLevel(logging.INFO)
    the_plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if the_plan.get("first_shared_memory"):  # keeps clear of other programs on this machine
        prefix._each_prefix_int = lambda: itertools.count(the_plan["first_shared_memory"])
    sys.exit(exit_code(lambda: main(the_plan), "train"))
