"""An epoch that comes whole: with all its steps and samples, or in one named error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from composer.utils import dist
from torch.utils.data import DataLoader

from composer_path.batches.balance import BalancedStreamingDataset
from composer_path.batches.batch import Batch
from composer_path.batches.memory_ring import forget_ended_workers
from composer_path.batches.worker_watch import WorkerWatch
from composer_path.stream.error import StreamError
from composer_path.stream.guarded import GuardedStreamingDataset


class WholeEpochLoader(DataLoader):
    """A DataLoader whose epochs have all their steps and samples, or end in a `StreamError`.

    Args:
        dataset: Whose epochs these are.
        timeout: Seconds to wait for a batch; 0 waits for ever.
        **loader: Keywords of torch's DataLoader.
    """

    def __init__(self, dataset: GuardedStreamingDataset, *, timeout: int | float = 0, **loader: Any) -> None:
        super().__init__(dataset, **loader)
        self.watch = WorkerWatch(timeout if self.num_workers else 0)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """One epoch, or the rest of a resumed one.

        Where it goes on: Composer keeps the dataset's `state_dict` in a checkpoint and gives it back to its
        `load_state_dict` (stream/resume.py), which the next iteration starts from.
        """
        dataset: GuardedStreamingDataset = self.dataset  # type: ignore[assignment]
        dataset.raise_failure()
        (steps, samples), step, seen = dataset.to_come(), 0, 0
        batches = self._asked(super().__iter__)
        while (batch := self._asked(lambda: next(batches, None))) is not None:
            if not step and isinstance(dataset, BalancedStreamingDataset) and dist.get_global_rank() == 0:
                dataset.log_imbalance()  # the epoch's order is known once its first batch is here
            step, seen = step + 1, seen + batch.num_samples
            if step == steps:  # who counts steps doesn't ask for one more
                self._check(seen, samples)
            yield batch
        forget_ended_workers()
        self._check(seen, samples)

    def _asked(self, ask: Callable[[], Any]) -> Any:
        """What workers answer, or a `StreamError`: theirs, which arrives as text, or that none of them answers."""
        dataset: GuardedStreamingDataset = self.dataset  # type: ignore[assignment]
        failed = False
        try:
            with self.watch.waiting():
                self.watch.workers = getattr(self._iterator, "_workers", self.watch.workers)
                answer = ask()
                self.watch.workers = getattr(answer, "_workers", self.watch.workers)
                return answer
        except (RuntimeError, OSError, EOFError):  # also of a worker that was killed meanwhile
            failed = dataset.failure() is not None
            if not failed and self.watch.found is None:
                raise
        if not failed:
            self.watch.end()
            fix = "look for what stopped them or keeps them busy; train_loader.timeout says how long to wait"
            dataset.note(StreamError.of("", "stalled", dataset.where(), str(self.watch.found), fix))
        forget_ended_workers()
        dataset.raise_failure()  # here, so that no worker's traceback stands around it

    def _check(self, seen: int, samples: int) -> None:
        dataset: GuardedStreamingDataset = self.dataset  # type: ignore[assignment]
        if seen != samples:
            found = f"an epoch of this rank ended after {seen:,} of {samples:,} samples"
            raise StreamError.of("", "samples-missing", dataset.where(), found, "please report this")
