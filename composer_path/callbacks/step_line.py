"""One clear line a step on the console, for runs whose output goes to a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from composer_path.run.late_losses import LateLosses


class StepLine(LoggerDestination):
    """Prints step, loss, learning rates and speed from what others log; reads nothing from the GPU.

    A step's line waits for its loss, which comes from a GPU while the next step runs.

    Args:
        every: Print each n-th step (and every evaluation).
        stream: Standard error by default, as progress bars use.
    """

    def __init__(self, every: int = 1, stream: TextIO | None = None) -> None:
        self.every, self.stream = every, stream
        self.latest: dict[str, Any] = {}
        self.losses: Mapping[str, Any] = self.latest  # of the newest step
        self.held: tuple[str, Mapping[str, Any], str] | None = None  # a line: what stands before its loss, and after
        self.last_time, self.last_samples = time.monotonic(), 0

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Remember the newest value of everything."""
        self.latest.update(metrics)

    def log_losses(self, losses: LateLosses, step: int | None = None) -> None:
        """Remember a step's losses, which may still be on their way."""
        self.losses = losses

    def batch_end(self, state: State, logger: Logger) -> None:
        """Print the step that just ended, or, if its loss isn't here, the one before."""
        self.show()
        now, batch = time.monotonic(), state.timestamp.batch.value
        if dist.get_global_rank() != 0 or batch % self.every:
            return
        samples = state.timestamp.sample.value
        rate = (samples - self.last_samples) / max(now - self.last_time, 1e-9)
        self.last_time, self.last_samples = now, samples
        duration, length, total = state.max_duration, state.dataloader_len, None  # steps of the run, where known
        if duration is not None and duration.unit.value == "ba":
            total = duration.value
        elif duration is not None and duration.unit.value == "ep" and length is not None:
            total = duration.value * int(length)
        rates = sorted({float(group["lr"]) for optimizer in state.optimizers for group in optimizer.param_groups})
        self.held = (
            f"{state.run_name} step {batch}{f'/{total}' if total else ''}  loss ",
            self.losses,
            f"  lr {' '.join(f'{value:.2e}' for value in rates)}  {rate:.1f} samples/s",
        )
        if not isinstance(self.losses, LateLosses) or self.losses.arrived():
            self.show()

    def show(self) -> None:
        """Print the line that is held back."""
        if self.held is not None:
            (before, losses, after), self.held = self.held, None
            self._print(f"{before}{float(losses.get('loss/train/total', float('nan'))):.4f}{after}")

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Hold nothing back."""
        self.show()

    def eval_start(self, state: State, logger: Logger) -> None:
        """Likewise."""
        self.show()

    def fit_end(self, state: State, logger: Logger) -> None:
        """Likewise."""
        self.show()

    def close(self, state: State, logger: Logger) -> None:
        """Likewise; an error may have ended the run."""
        self.show()

    def eval_end(self, state: State, logger: Logger) -> None:
        """Print what an evaluation found."""
        found = {key: value for key, value in self.latest.items() if key.startswith("metrics/")}
        values = "  ".join(f"{key.removeprefix('metrics/')} {float(value):.4f}" for key, value in found.items())
        if dist.get_global_rank() == 0 and values:
            self._print(f"{state.run_name} step {state.timestamp.batch.value}  {values}")

    def _print(self, line: str) -> None:
        print(line, file=self.stream or sys.stderr, flush=True)
