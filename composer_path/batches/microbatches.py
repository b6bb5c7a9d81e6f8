"""Microbatches: into which bins a row's samples are laid, and where every rank cuts its row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from composer.utils import dist
from jaxtyping import Int, Int64
from torch import Tensor

Batch = dict[str, Any]  # see composer_path/batches/collator.py


class EmptyBatchError(ValueError):
    """A global batch without a single answer token: there is nothing to learn from and nothing to divide by."""


def fewest_bins(lengths: Sequence[int], limit: int | None) -> list[list[int]]:
    """Split samples into as few bins of at most `limit` tokens as first-fit-decreasing finds, then even them out.

    Returns:
        For each bin, the indices of its samples in their original order; bins in the order of their first sample.
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


def split_batch(batch: Batch, microbatch_size: int | float) -> list[Batch]:
    """Cut a row into microbatches, as many on every rank: under FSDP each is a collective forward pass.

    Args:
        batch: From `PackedCollator`, laid out bin by bin.
        microbatch_size: At most so many samples in each; Composer hands over the device batch size.

    Raises:
        EmptyBatchError: No rank has an answer token.
    """
    counts = cap_bins(batch["samples_per_bin"], int(microbatch_size))
    num_bins, largest_weight = agree_over_ranks(len(counts), batch["loss_weight"])
    if largest_weight == 0:
        problems = sorted({problem for problem in batch["problems"] if problem})
        raise EmptyBatchError(
            f"a batch of {len(batch['num_images'])} samples a rank has no answer token at all (samples "
            f"{batch['sample_ids'].tolist()[:8]} here{': ' + '; '.join(problems[:3]) if problems else ''}); "
            "raise max_seq_len, or convert the data again without such records"
        )
    counts = add_cuts(counts, batch["cu_seq_lens"].tolist(), num_bins)
    starts = [sum(counts[:at]) for at in range(len(counts))]
    return [slice_batch(batch, start, start + count) for start, count in zip(starts, counts, strict=True)]


def cap_bins(samples_per_bin: list[int], most: int) -> list[int]:
    """Split bins of more than `most` samples."""
    counts: list[int] = []
    for count in samples_per_bin:
        counts += [most] * (count // most) + ([count % most] if count % most else [])
    return counts


def add_cuts(samples_per_bin: list[int], borders: list[int], num_bins: int) -> list[int]:
    """Cut the largest bins at a sample's border until there are `num_bins`; a single sample is never cut.

    Args:
        samples_per_bin: Samples in each bin, in the row's order.
        borders: Token borders of the samples.
        num_bins: As many as the rank with the most has; ranks hold equally many samples, so it can always be reached.
    """
    counts = list(samples_per_bin)
    while len(counts) < num_bins:
        starts = [sum(counts[:at]) for at in range(len(counts))]
        tokens = [
            borders[start + count] - borders[start] if count > 1 else 0
            for start, count in zip(starts, counts, strict=True)
        ]
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
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    largest = torch.tensor([num_bins, loss_weight], dtype=torch.float64, device=device)
    dist.all_reduce(largest, reduce_operation="MAX")
    most, weight = largest.tolist()
    return int(most), weight


def slice_batch(batch: Batch, start: int, stop: int) -> Batch:
    """Samples start to stop of a row as a batch of their own; its tensors are views but for the shifted indices.

    Everything lies on the CPU still: Composer moves each microbatch to the device when its turn has come. So nothing
    here waits for the device.
    """
    borders = batch["cu_seq_lens"].tolist()
    tokens = slice(borders[start], borders[stop])
    images = _range(batch["num_images"], start, stop)
    targets = _range(batch["num_targets"], start, stop)
    placeholders = _range(batch["num_placeholders"], start, stop)
    weights = batch["target_weights"][targets]
    cu_seq_lens = _shifted(batch["cu_seq_lens"][start : stop + 1], borders[start])
    part = {key: batch[key][tokens] for key in ("input_ids", "position_ids", "labels")}
    of_images = ("pixel_values", "image_features", "is_he", "image_sample_ids")
    part |= {key: batch[key][images] for key in of_images if key in batch}
    part |= {key: batch[key][start:stop] for key in ("sample_ids", "num_images", "num_targets", "num_placeholders")}
    part |= {key: batch[key][start:stop] for key in ("sources", "problems")}
    return part | {
        "cu_seq_lens": cu_seq_lens,
        "max_seq_len": int(torch.diff(cu_seq_lens).max()),
        "supervised_index": _shifted(batch["supervised_index"][targets], borders[start]),
        "targets": batch["targets"][targets],
        "target_weights": weights,
        "loss_weight": float(weights.double().sum()),
        "image_index": _shifted(batch["image_index"][placeholders], borders[start]),
        "samples_per_bin": [stop - start],
    }


def _shifted(index: Int[Tensor, " entries"], by: int) -> Int[Tensor, " entries"]:
    """An index counted from another start; page-locked if the row is, so that its copy to the device doesn't wait."""
    return torch.sub(index, by, out=torch.empty_like(index, pin_memory=index.is_pinned()))


def _range(counts: Int64[Tensor, " samples"], start: int, stop: int) -> slice:
    return slice(int(counts[:start].sum()), int(counts[:stop].sum()))
