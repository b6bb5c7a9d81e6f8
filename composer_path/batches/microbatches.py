"""Microbatches in numbers: which sample lies in which bin of a row, and where every rank cuts its row.

`limit` is the YAML's `max_tokens_per_microbatch`; the collator fills bins, `split_batch` of batch.py cuts between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from composer.utils import dist


def fewest_bins(lengths: Sequence[int], limit: int | None) -> list[list[int]]:
    """Split samples into as few bins of at most `limit` tokens as first-fit-decreasing finds, then even them out.

    A bin has the indices of its samples in their original order; bins stand in the order of their first sample.
    """
    if limit is None:
        return [list(range(len(lengths)))]
    longest_first = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    tight = _first_fit(longest_first, lengths, limit)
    bins = _spread(longest_first, lengths, len(tight))
    if any(sum(lengths[index] for index in indices) > limit and len(indices) > 1 for indices in bins):
        bins = tight  # evening out broke the limit
    return sorted(sorted(indices) for indices in bins)


def _first_fit(order: Sequence[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Each sample into the first bin that has room for it."""
    bins: list[list[int]] = []
    totals: list[int] = []
    for index in order:
        at = next((at for at, total in enumerate(totals) if total + lengths[index] <= limit), len(bins))
        if at == len(bins):
            bins.append([])
            totals.append(0)
        bins[at].append(index)
        totals[at] += lengths[index]
    return bins


def _spread(order: Sequence[int], lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    """Each sample into the emptiest bin: nearly equal bins."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    totals = [0] * num_bins
    for index in order:
        at = totals.index(min(totals))
        bins[at].append(index)
        totals[at] += lengths[index]
    return bins


def cap_bins(samples_per_bin: list[int], most: int) -> list[int]:
    """Split bins of more than `most` samples (the device batch size)."""
    counts: list[int] = []
    for count in samples_per_bin:
        counts += [most] * (count // most) + ([count % most] if count % most else [])
    return counts


def add_cuts(samples_per_bin: list[int], borders: list[int], num_bins: int) -> list[int]:
    """Cut the largest bins at a sample's border (in tokens) until there are `num_bins`; a single sample is never cut.

    The rank with the most bins has so many; ranks hold equally many samples, so it can always be reached.
    """
    counts = list(samples_per_bin)
    while len(counts) < num_bins:
        starts = [sum(counts[:at]) for at in range(len(counts))]
        bins = zip(starts, counts, strict=True)
        tokens = [borders[start + count] - borders[start] if count > 1 else 0 for start, count in bins]
        at = tokens.index(max(tokens))
        if tokens[at] == 0:
            raise ValueError(
                f"this rank has {len(counts)} samples, another needs {num_bins} microbatches; set drop_last: true or a "
                "global_batch_size that the ranks share evenly"
            )
        start, count = starts[at], counts[at]
        middle = borders[start] + tokens[at] / 2
        left = min(range(1, count), key=lambda k: abs(borders[start + k] - middle))
        counts[at : at + 1] = [left, count - left]
    return counts


def agree_over_ranks(num_bins: int, loss_weight: float) -> tuple[int, float]:
    """The largest number of bins and the largest loss weight of any rank."""
    if dist.get_world_size() == 1:
        return num_bins, loss_weight
    largest = torch.tensor([num_bins, loss_weight], dtype=torch.float64, device=run_device())
    dist.all_reduce(largest, reduce_operation="MAX")
    most, weight = largest.tolist()
    return int(most), weight


def run_device() -> torch.device:
    """Where this process trains: Composer's process group, be it of one process, has the backend of its device."""
    on_gpu = torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
