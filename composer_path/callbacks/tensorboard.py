"""TensorBoard's files as Composer writes them, with a step's numbers in one record instead of one for each number."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

import composer.loggers
import torch
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist

from composer_path.run.late_losses import LateLosses


class TensorboardLogger(composer.loggers.TensorboardLogger):
    """Composer's, whose writing costs less: a record takes a lock, a checksum and another thread's attention.

    What is logged is written when the step has ended, its losses when they have come from the device; then and at
    every end of an epoch, an evaluation or the run, TensorBoard shows what it would show with Composer's own.

    Args:
        log_dir: A folder; null: `runs` in the run's own.
        flush_interval: Write out every so many steps, each time to a new file.
        rank_zero_only: Whether only the first rank writes.
    """

    def __init__(self, log_dir: str | None = None, flush_interval: int = 100, rank_zero_only: bool = True) -> None:
        super().__init__(log_dir, flush_interval, rank_zero_only)
        self.waiting: list[tuple[int | None, float, Mapping[str, Any]]] = []  # step, moment, values

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Keep values until they are written."""
        if not self.rank_zero_only or dist.get_global_rank() == 0:
            held = metrics if isinstance(metrics, LateLosses) else {name: _kept(it) for name, it in metrics.items()}
            self.waiting.append((step, time.time(), held))

    log_losses = log_metrics  # of a step, that may still be on their way

    def batch_end(self, state: State, logger: Logger) -> None:
        """Write what is here; all, where the file is closed."""
        closes = state.timestamp.batch.value % self.flush_interval == 0
        if closes or all(values.arrived() for _, _, values in self.waiting if isinstance(values, LateLosses)):
            self.write()
        super().batch_end(state, logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Write all, and close the file."""
        self.write()
        super().epoch_end(state, logger)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Likewise, with the newest values of all as those of the hyperparameters."""
        self.write()
        super().eval_end(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Likewise."""
        self.write()
        super().fit_end(state, logger)

    def close(self, state: State, logger: Logger) -> None:
        """Likewise; an error may have ended the run."""
        if self.writer is not None:
            self.write()
        super().close(state, logger)

    def write(self) -> None:
        """Write what waits, a record for each row of values of one step."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # here, as it takes a while

        waiting, self.waiting = self.waiting, []
        writer: Any = self.writer
        for step, entries in groupby(waiting, key=lambda entry: entry[0]):
            rows = list(entries)
            self.current_metrics.update({name: value for _, _, values in rows for name, value in values.items()})
            values = list(_scalars(values for _, _, values in rows))
            if values:
                (first, *others), moment = values, rows[0][1]
                writer.add_scalar(first.tag, first.simple_value, step, moment)  # which opens a file where none is
                writer.file_writer.add_summary(Summary(value=others), step, moment)


def _kept(value: Any) -> Any:
    """A value that nobody changes any more; a copy on the device waits for nothing."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _scalars(rows: Iterable[Mapping[str, Any]]) -> Iterable[Any]:
    """The numbers among values, as TensorBoard has them; like Composer's, texts and what is no number are left out."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard.summary import scalar

    for values in rows:
        for name, value in values.items():
            if isinstance(value, int | float):
                yield Summary.Value(tag=name, simple_value=float(value))
            elif not isinstance(value, str):
                try:
                    yield from scalar(name, value).value
                except NotImplementedError:
                    continue
