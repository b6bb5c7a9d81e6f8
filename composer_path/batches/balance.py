"""Balanced batches: an epoch's samples are exchanged inside each global batch until all ranks have equal work.

An epoch is Streaming's array of samples `[nodes, ranks, workers, batches, batch_size]`, each `numbered` (order.py). A
rank takes its workers' batches in turn, so the global batch of step `s` is `[:, :, s % workers, s // workers]`. No
sample leaves its global batch, so loss and gradients stay as they are, to rounding. Checkpoints say whether ranks were
balanced: a resumed run goes on as it began.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Int64, Integer
from torch import Tensor

from composer_path.shards.lengths import LengthsError
from composer_path.stream.error import StreamError, of_all_ranks
from composer_path.stream.guarded import GuardedStreamingDataset
from composer_path.stream.order import sample_of

log = logging.getLogger(__name__)

Reach = Literal["node", "global"]
Balance = Literal["auto", "node", "global"]  # as a YAML says it; auto: where lengths are there
_GROUPS_AT_ONCE = 4096
_SWAPS_PER_RANK = 2  # after the dealing; twice as many even out nothing more that could be measured

Work = Int64[np.ndarray, "nodes ranks workers batches batch_size"]
Steps = Int64[np.ndarray, "steps nodes ranks batch_size"]
Groups = Int64[np.ndarray, "groups ranks batch_size"]
Tokens = Integer[np.ndarray, " samples"]


class BalancedStreamingDataset(GuardedStreamingDataset):
    """Exchanges samples between ranks inside each global batch, after `balance` was called; else as it was drawn."""

    def __init__(self, **streaming: Any) -> None:
        super().__init__(**streaming)
        self._balance: tuple[Tokens, Reach] | None = None
        self._imbalance: Tensor | None = None
        self._as_it_began = False  # whether a checkpoint decides, as nobody did

    def balance(self, tokens: Tokens, reach: Reach) -> None:
        """From the next epoch on, give all ranks equally many of the `tokens` that each position's sample has."""
        self._balance = tokens, reach
        if _leads("LOCAL_RANK"):  # whose first worker deals an epoch's samples out
            self._imbalance = torch.ones(2, dtype=torch.float64).share_memory_()

    def balance_if_measured(self, stored_lengths: Callable[[], Tokens]) -> None:
        """Balance where lengths are there on all ranks, else leave batches as drawn; one line of the log says which.

        A resumed run goes on as it began, whatever is there now.
        """
        self._as_it_began = True
        tokens, problem = None, None
        try:
            tokens = stored_lengths()
        except (LengthsError, OSError) as error:
            problem = str(error)
        problem = next(filter(None, of_all_ranks(problem)), None)
        if tokens is None or problem is not None:
            _tell("balance=auto: batches as drawn; %s", problem)
            return
        # Where each node has all shards on its disk, an exchange over all ranks fetches nothing.
        reach: Reach = "node" if any(stream.remote is not None for stream in self.streams) else "global"
        _tell("balance=auto: ranks get equal tokens in each step (%s), as measured", reach)
        self.balance(tokens, reach)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where to go on, and whether ranks were balanced. The key is always there, as sharded checkpoints need."""
        return super().state_dict(num_samples, from_beginning) | {"balance": self._reach}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Go on there; after `balance_if_measured` with the ranks' shares as they were.

        Raises:
            StreamError: They were balanced, and there are no lengths any more.
        """
        began: Reach | None = obj.get("balance")  # not known of an earlier version's run: as drawn, or as the YAML says
        if began != self._reach and self._as_it_began:
            self._go_on(began)
        elif began != self._reach:
            _tell("balance=%s, as the YAML says; this run began with %s", self._reach or "null", began or "null")
        super().load_state_dict(obj)

    def _go_on(self, began: Reach | None) -> None:
        if began is not None and self._balance is None:
            found = f"this run began with balanced ranks ({began}), and balance=auto has no lengths of its samples now"
            fix = "measure them with composer-path lengths, or give balance=null to go on with batches as drawn"
            raise StreamError.of("", "lengths-missing", self.where(), found, fix)
        self._balance = None if began is None or self._balance is None else (self._balance[0], began)
        self._imbalance = self._imbalance if self._balance is not None else None
        _tell("balance=auto: %s, as this run began", "batches as drawn" if began is None else f"balanced ({began})")

    @property
    def _reach(self) -> Reach | None:
        return None if self._balance is None else self._balance[1]

    @property
    def imbalance(self) -> tuple[float, float] | None:
        """Of the epoch that was begun last, as it would be and as it is; None where nothing is balanced.

        Known on the first rank of each node, see the function `imbalance`.
        """
        return None if self._imbalance is None else (float(self._imbalance[0]), float(self._imbalance[1]))

    def log_imbalance(self) -> None:
        """Say it, if anything is balanced."""
        if (found := self.imbalance) is not None:
            log.info("tokens of the fullest rank over the mean rank's: %.4f as drawn, %.4f balanced", *found)

    def _share_work(self, sample_ids: Work) -> Any:
        """Streaming's one place where an epoch's order is complete, before this node's other workers get it.

        It is changed in place, because the worker that made it goes on with this very array.
        """
        if self._balance is not None and sample_ids.size:
            tokens, reach = self._balance
            balanced = balance_work(sample_ids, tokens, reach)
            if self._imbalance is not None:
                self._imbalance[0], self._imbalance[1] = imbalance(sample_ids, tokens), imbalance(balanced, tokens)
            sample_ids[:] = balanced
        return super()._share_work(sample_ids)


def _leads(variable: str) -> bool:
    return int(os.environ.get(variable, "0")) == 0


def _tell(line: str, *values: object) -> None:
    """Once for all ranks."""
    if _leads("RANK"):
        log.info(line, *values)


def balance_work(work: Work, tokens: Tokens, reach: Reach) -> Work:
    """Exchange samples inside each global batch so that every rank has as many as before, of nearly equal tokens.

    An empty slot is below 0. `node`: ranks exchange with those of their node, whose shards lie on the same disk;
    `global`: with all.
    """
    if reach not in get_args(Reach):
        raise ValueError(f"balance: found {reach!r}; it must be one of {', '.join(get_args(Reach))}")
    steps = _by_step(work)
    groups = steps.reshape(-1, *steps.shape[-2:]) if reach == "node" else _across_nodes(steps)
    parts = [_balance(groups[at : at + _GROUPS_AT_ONCE], tokens) for at in range(0, len(groups), _GROUPS_AT_ONCE)]
    nodes, ranks, workers, batches, size = work.shape
    balanced = np.concatenate(parts or [groups]).reshape(batches, workers, nodes, ranks, size)
    return np.ascontiguousarray(balanced.transpose(2, 3, 1, 0, 4))


def imbalance(work: Work, tokens: Tokens) -> float:
    """How much longer steps take than with equal ranks: the fullest rank's tokens over the mean rank's, over all steps.

    1 is perfect; every rank waits for the fullest one. An epoch without a sample counts as 1.
    """
    steps = _across_nodes(_by_step(work))
    loads = np.where(steps >= 0, tokens[np.maximum(sample_of(steps), 0)], 0).sum(axis=2, dtype=np.int64)
    mean = loads.mean(axis=1).sum()
    return float(loads.max(axis=1).sum() / mean) if mean else 1.0


def _by_step(work: Work) -> Steps:
    nodes, ranks, workers, batches, size = work.shape
    return np.ascontiguousarray(work.transpose(3, 2, 0, 1, 4)).reshape(batches * workers, nodes, ranks, size)


def _across_nodes(steps: Steps) -> Int64[np.ndarray, "steps all_ranks batch_size"]:
    count, nodes, ranks, size = steps.shape
    return steps.reshape(count, nodes * ranks, size)


def _balance(groups: Groups, tokens: Tokens) -> Groups:
    """Whole groups together; the epoch's last one, whose batches may be smaller, by itself if they are equally so."""
    balanced = groups.copy()
    filled: Bool[np.ndarray, "groups ranks batch_size"] = groups >= 0
    whole = filled.all(axis=(1, 2))
    if whole.any():
        balanced[whole] = _deal(groups[whole], tokens)
    for at in np.flatnonzero(~whole & filled.any(axis=(1, 2))):
        counts = filled[at].sum(axis=1)
        if (counts == counts[0]).all():  # ranks must keep their numbers of samples
            balanced[at][filled[at]] = _deal(groups[at][filled[at]].reshape(1, len(counts), -1), tokens).ravel()
    return balanced


def _deal(groups: Groups, tokens: Tokens) -> Groups:
    """The longest sample first, each to the rank with the fewest tokens that still has room; then some are swapped."""
    count, ranks, size = groups.shape
    flat = groups.reshape(count, ranks * size)
    order = np.lexsort((flat, -tokens[sample_of(flat)].astype(np.int64)), axis=1)  # equally long ones by their ids
    ids = np.take_along_axis(flat, order, axis=1)
    lengths = tokens[sample_of(ids)].astype(np.int64)
    dealt, rows = np.empty_like(groups), np.arange(count)
    loads, taken = np.zeros((count, ranks), np.int64), np.zeros((count, ranks), np.int64)
    for at in range(ranks * size):
        rank = np.where(taken < size, loads, np.iinfo(np.int64).max).argmin(axis=1)
        dealt[rows, rank, taken[rows, rank]] = ids[:, at]
        loads[rows, rank] += lengths[:, at]
        taken[rows, rank] += 1
    for _ in range(_SWAPS_PER_RANK * ranks):
        if not _swap(dealt, tokens, loads):
            break
    return dealt


def _swap(groups: Groups, tokens: Tokens, loads: Int64[np.ndarray, "groups ranks"]) -> bool:
    """Swap, in place, the pair of each group that best evens out its fullest and emptiest rank; tells if any did."""
    rows = np.arange(len(groups))
    full, empty = loads.argmax(axis=1), loads.argmin(axis=1)
    gap = loads[rows, full] - loads[rows, empty]
    ours, theirs = groups[rows, full], groups[rows, empty]
    moved = (
        tokens[sample_of(ours)].astype(np.int64)[:, :, None] - tokens[sample_of(theirs)].astype(np.int64)[:, None, :]
    )
    left = np.abs(gap[:, None, None] - 2 * moved).reshape(len(groups), -1)  # of the gap, after the swap
    best = left.argmin(axis=1)
    at = np.flatnonzero(left[rows, best] < gap)
    i, j = np.unravel_index(best[at], moved.shape[1:])
    groups[at, full[at], i], groups[at, empty[at], j] = theirs[at, j], ours[at, i]
    loads[at, full[at]] -= moved[at, i, j]
    loads[at, empty[at]] += moved[at, i, j]
    return len(at) > 0
