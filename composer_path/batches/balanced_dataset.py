"""A stream whose ranks get equally many tokens of each global batch, once it is told how long its samples are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, Integer
from torch import Tensor

from composer_path.batches.balance import balance_work, imbalance
from composer_path.stream.guarded import GuardedStreamingDataset


class BalancedStreamingDataset(GuardedStreamingDataset):
    """Exchanges samples between ranks inside each global batch, after `balance` was called; else as it was drawn.

    Args:
        **streaming: Keywords of `GuardedStreamingDataset` and `streaming.StreamingDataset`, passed through.
    """

    def __init__(self, **streaming: Any) -> None:
        super().__init__(**streaming)
        self._balance: tuple[Integer[np.ndarray, " samples"], str] | None = None
        self._imbalance: Tensor | None = None

    def balance(self, tokens: Integer[np.ndarray, " samples"], reach: str) -> None:
        """From the next epoch on, give all ranks equally many tokens of each global batch.

        Args:
            tokens: Length of each sample, by its position in the stream.
            reach: See `composer_path.batches.balance.balance_work`.

        Raises:
            ValueError: Each rank is to have batches of one stream only.
        """
        if self.batching_method == "device_per_stream":
            raise ValueError(
                "balance: would mix the streams that dataset.batching_method=device_per_stream keeps apart on each "
                "rank; leave out one of the two"
            )
        self._balance = tokens, reach
        self._imbalance = torch.ones(2, dtype=torch.float64).share_memory_()

    @property
    def imbalance(self) -> tuple[float, float] | None:
        """Of the epoch that was begun last, as it would be and as it is; None where nothing is balanced.

        Known on the first rank of each node, see `composer_path.batches.balance.imbalance`.
        """
        return None if self._imbalance is None else (float(self._imbalance[0]), float(self._imbalance[1]))

    def _share_work(self, sample_ids: Int64[np.ndarray, "nodes ranks workers batches batch_size"]) -> Any:
        """Streaming's one place where an epoch's order is complete, before this node's other workers get it.

        It is changed in place, because the worker that made it goes on with this very array.
        """
        if self._balance is not None and self._imbalance is not None and sample_ids.size:
            tokens, reach = self._balance
            balanced = balance_work(sample_ids, tokens, reach)
            self._imbalance[0], self._imbalance[1] = imbalance(sample_ids, tokens), imbalance(balanced, tokens)
            sample_ids[:] = balanced
        return super()._share_work(sample_ids)
