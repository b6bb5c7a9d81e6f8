"""Our way: the product's YAML through `composer_path.train.train`, watched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.prepare import plan_of
from composer_path import ComposerPathMLLM
from composer_path.config.reading import load_config
from composer_path.train import train


class Watch(Callback):
    """Tells the clock what Composer does."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Gradients of all microbatches are there, the optimizer hasn't stepped."""
        self.clock.note_gradients(adapter_of(state).model)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Composer ended a step."""
        total: Any = state.total_loss_dict["loss/train/total"]
        self.clock.note(total, adapter_of(state).flops, state.batch)


def adapter_of(state: State) -> ComposerPathMLLM:
    """What Composer trains, from within DDP."""
    return getattr(state.model, "module", state.model)  # type: ignore[return-value]


def run(task: dict[str, Any]) -> dict[str, Any]:
    """A training run.

    Args:
        task: `yaml` and `overrides`, `steps`, `skip`, `checkpointing`, and of the stage `facts`.
    """
    torch.manual_seed(17)
    clock = Clock(task["steps"], task["skip"])
    train(load_config(Path(task["yaml"]), task["overrides"]), callbacks=[Watch(clock)])
    report = clock.report()
    planned = plan_of(report["peak_bytes"], report["largest_row"], task["facts"], task["checkpointing"])
    return report | (planned if task["work"] == "road" else {})
