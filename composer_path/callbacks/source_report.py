"""What each source brings: samples seen and loss, over all ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from composer_path.printable import printable


class SourceReport(Callback):
    """Logs, for each stream of a mixture or each `source` that records name, at intervals.

    `source/<name>/samples`: seen so far. `source/<name>/loss`: mean over its answer tokens since the last report.

    Sums stay on the device; ranks exchange them, and the host waits for the device, only when it reports.

    Args:
        interval: Report every so many batches.
    """

    def __init__(self, interval: int = 10) -> None:
        if interval < 1:
            raise ValueError(f"source_report.interval: found {interval}; it must be at least 1")
        self.interval = interval
        self.seen: dict[str, int] = {}  # over all ranks, when last reported
        self.new: Counter[str] = Counter()  # on this rank, since then
        self.slots: dict[str, int] = {}
        self.sums: Tensor | None = None  # [slots, 2]: losses and answer tokens

    def batch_start(self, state: State, logger: Logger) -> None:
        """Count the samples."""
        pairs = zip(state.batch.sample_ids.tolist(), state.batch.sources, strict=True)
        self.new.update(source for sample_id, source in pairs if sample_id >= 0)
        for source in state.batch.sources:
            self.slots.setdefault(source, len(self.slots))

    def after_loss(self, state: State, logger: Logger) -> None:
        """Add a microbatch's losses."""
        adapter: Any = getattr(state.model, "module", state.model)  # a `ComposerPathMLLM`, from within DDP
        losses = adapter.last_token_losses
        if losses is None or not len(losses):
            return
        if self.sums is None or len(self.sums) < len(self.slots):
            old, self.sums = self.sums, torch.zeros((2 * len(self.slots) + 8, 2), device=losses.device)
            if old is not None:
                self.sums[: len(old)] += old
        counts = state.batch.num_targets.to(losses.device, non_blocking=True)
        slots = torch.tensor([self.slots[source] for source in state.batch.sources])
        # With its size given, this waits for nothing.
        index = slots.to(losses.device, non_blocking=True).repeat_interleave(counts, output_size=len(losses))
        self.sums.index_add_(0, index, torch.stack([losses, torch.ones_like(losses)], dim=1))

    def batch_end(self, state: State, logger: Logger) -> None:
        """Report at intervals."""
        if state.timestamp.batch.value % self.interval == 0:
            self.epoch_end(state, logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Report what came since the last report."""
        sums = [] if self.sums is None else self.sums.tolist()
        mine = {name: (self.new[name], *(sums[at] if at < len(sums) else (0, 0))) for name, at in self.slots.items()}
        totals: dict[str, list[float]] = {}
        for theirs in dist.all_gather_object(mine):
            for name, values in theirs.items():
                totals[name] = [a + b for a, b in zip(totals.get(name, [0, 0, 0]), values, strict=True)]
        metrics: dict[str, float] = {}
        for name, (samples, loss, tokens) in totals.items():
            self.seen[name] = self.seen.get(name, 0) + int(samples)
            if self.seen[name]:
                metrics[f"source/{printable(name)}/samples"] = self.seen[name]
            if tokens:
                metrics[f"source/{printable(name)}/loss"] = loss / tokens
        self.new.clear()
        if self.sums is not None:
            self.sums.zero_()
        if metrics:
            logger.log_metrics(metrics)

    def state_dict(self) -> dict[str, Any]:
        """Counts go on after a resume, from the last report."""
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them up again."""
        self.seen = dict(state["seen"])
