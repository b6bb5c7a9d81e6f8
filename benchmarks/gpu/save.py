"""What saving takes: a checkpoint, and the weights that a run hands on."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger

from composer_path.config.reading import load_config, plain
from composer_path.train import train

ROOM = 1.1  # of what is written, that must be free


class SaveWatch(Callback):
    """Time from a step's end until everything is written; stands behind what writes weights."""

    def __init__(self) -> None:
        self.stepped = self.weights_s = self.all_s = 0.0

    def batch_end(self, state: State, logger: Logger) -> None:
        """The step is over, nothing is written yet."""
        self.stepped = time.perf_counter()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Weights are written, the checkpoint comes next."""
        self.weights_s = time.perf_counter() - self.stepped

    def fit_end(self, state: State, logger: Logger) -> None:
        """Everything is written."""
        self.all_s = time.perf_counter() - self.stepped


def run(task: dict[str, Any]) -> dict[str, Any]:
    """A run of two steps that saves at its end.

    Args:
        task: `yaml` and `overrides`, and of the stage `facts`. A checkpoint for which the disk has no room is left out.
    """
    settings = plain(load_config(Path(task["yaml"]), task["overrides"]))
    folder = Path(settings["save_root"], settings["trainer"]["run_name"])
    shutil.rmtree(folder, ignore_errors=True)
    facts = task["facts"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    only_projector = settings["model"]["trainable"] == ["projector"]
    handed_on = facts["checkpoint_bytes"] / 3 if only_projector else 4.0 * facts["trained"] + 2.0 * facts["frozen"]
    if free < ROOM * handed_on:
        raise RuntimeError(
            f"{folder.parent}: {handed_on / 1e9:.0f} GB must be free for weights, found {free / 1e9:.0f}"
        )
    with_checkpoint = free > ROOM * (handed_on + facts["checkpoint_bytes"])
    words = [
        "trainer.max_duration=2ba",
        f"trainer.save_interval={'2ba' if with_checkpoint else 'null'}",
        "callbacks={save_weights: {interval: 2ba}}",
    ]
    watch = SaveWatch()
    train(load_config(Path(task["yaml"]), [*task["overrides"], *words]), callbacks=[watch])
    files = [path for path in folder.rglob("*") if path.is_file()]
    written = sum(path.stat().st_size for path in files)
    shutil.rmtree(folder)
    return {
        "weights_s": watch.weights_s,
        "all_s": watch.all_s,
        "with_checkpoint": with_checkpoint,
        "checkpoint_gb": facts["checkpoint_bytes"] / 1e9,
        "free_gb": free / 1e9,
        "written_gb": written / 1e9,
    }
