"""What the batches hold: supervised share, padding avoided, waiting for data, and samples that can't be used."""

from __future__ import annotations

import logging
import time
from collections import Counter

from composer.core import Callback, State
from composer.loggers import Logger

from composer_path.batches.batch import Batch

log = logging.getLogger(__name__)


class BatchReport(Callback):
    """Logs, for each batch of this rank, from counts the loader's workers made (nothing is copied from the GPU).

    `batch/supervised_share`: answer tokens over tokens. `batch/padding_avoided`: the share of padding that the batch
    would have, padded to its longest sample. `batch/tokens`, `batch/images`. `batch/loader_wait_share`: of the step's
    time. `batch/unusable_samples`: so far; each kind is named once, with its position in the stream. Once an epoch,
    where ranks are balanced, `batch/rank_imbalance` and `batch/rank_imbalance_as_drawn`: the fullest rank over the
    mean rank's.
    """

    def __init__(self) -> None:
        self.problems: Counter[str] = Counter()
        self.wait_start = self.step_start = time.monotonic()
        self.wait = 0.0
        self.imbalance: tuple[float, float] | None = None

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Start waiting."""
        self.wait_start = time.monotonic()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """The batch is here."""
        self.wait = time.monotonic() - self.wait_start

    def batch_start(self, state: State, logger: Logger) -> None:
        """Report a batch's make-up."""
        batch: Batch = state.batch
        tokens, samples = len(batch.input_ids), len(batch.sample_ids)
        metrics = {
            "batch/tokens": tokens,
            "batch/images": len(batch.is_he),
            "batch/microbatches": len(batch.samples_per_bin),
            "batch/supervised_share": len(batch.targets) / tokens,
            "batch/padding_avoided": 1 - tokens / (samples * batch.max_seq_len),
            "batch/unusable_samples": self._count(batch),
        }
        imbalance = getattr(getattr(state.dataloader, "dataset", None), "imbalance", None)
        if imbalance is not None and imbalance != self.imbalance:
            self.imbalance = imbalance
            metrics |= {"batch/rank_imbalance_as_drawn": imbalance[0], "batch/rank_imbalance": imbalance[1]}
        logger.log_metrics(metrics)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Report how much of the step was waiting for data."""
        now = time.monotonic()
        logger.log_metrics({"batch/loader_wait_share": self.wait / max(now - self.step_start, 1e-9)})
        self.step_start = now

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Sum up the samples that were skipped."""
        if self.problems:
            counts = "; ".join(f"{count} times: {problem}" for problem, count in self.problems.most_common())
            log.warning("samples that kept their slot with weight 0 so far on this rank: %s", counts)

    def _count(self, batch: Batch) -> int:
        for sample_id, problem in zip(batch.sample_ids.tolist(), batch.problems, strict=True):
            if problem is not None:
                if problem not in self.problems:
                    log.warning(
                        "sample %d can't be used and counts nothing: %s (named once a kind)", sample_id, problem
                    )
                self.problems[problem] += 1
        return self.problems.total()
