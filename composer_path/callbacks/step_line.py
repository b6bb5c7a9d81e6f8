"""One clear line a step on the console, for runs whose output goes to a file."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist


class StepLine(LoggerDestination):
    """Prints step, loss, learning rates and speed from what others log; reads nothing from the GPU.

    Args:
        every: Print each n-th step (and every evaluation).
        stream: Standard error by default, as progress bars use.
    """

    def __init__(self, every: int = 1, stream: TextIO | None = None) -> None:
        self.every, self.stream = every, stream
        self.latest: dict[str, Any] = {}
        self.last_time, self.last_samples = time.monotonic(), 0

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Remember the newest value of everything."""
        self.latest.update(metrics)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Print the step that just ended."""
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
        self._print(
            f"{state.run_name} step {batch}{f'/{total}' if total else ''}"
            f"  loss {float(self.latest.get('loss/train/total', float('nan'))):.4f}"
            f"  lr {' '.join(f'{value:.2e}' for value in rates)}"
            f"  {rate:.1f} samples/s"
        )

    def eval_end(self, state: State, logger: Logger) -> None:
        """Print what an evaluation found."""
        found = {key: value for key, value in self.latest.items() if key.startswith("metrics/")}
        values = "  ".join(f"{key.removeprefix('metrics/')} {float(value):.4f}" for key, value in found.items())
        if dist.get_global_rank() == 0 and values:
            self._print(f"{state.run_name} step {state.timestamp.batch.value}  {values}")

    def _print(self, line: str) -> None:
        print(line, file=self.stream or sys.stderr, flush=True)
