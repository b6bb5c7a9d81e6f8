"""Data loader for Composer: batches, how they are split into microbatches, and how samples and tokens are counted."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from composer.core import DataSpec
from composer.utils import dist
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from composer_path.data.collator import Batch, PackedCollator, slice_batch
from composer_path.data.dataset import ConversationDataset
from composer_path.data.image import pad_color_of
from composer_path.data.stream_error import StreamError


class EmptyBatchError(ValueError):
    """A global batch without a single answer token: there is nothing to learn from and nothing to divide by."""


class WholeEpochLoader(DataLoader):
    """A DataLoader whose epochs end after their last sample, or in a `StreamError`."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """One epoch, or the rest of a resumed one."""
        dataset: ConversationDataset = self.dataset  # type: ignore[assignment]
        dataset.raise_failure()
        expected, seen, failed = dataset.samples_to_come(), 0, False
        try:
            for batch in super().__iter__():
                seen += len(batch["num_images"])
                yield batch
        except RuntimeError:  # a worker's StreamError as text, or a worker that was killed meanwhile
            failed = dataset.failure() is not None
            if not failed:
                raise
        if failed:
            dataset.raise_failure()  # here, so that no worker's traceback stands around it
        # A worker keeps its own, exact count; here at most its last, incomplete batch may be missing.
        dropped = (self.batch_size or 1) * max(1, self.num_workers) if self.drop_last else 0
        if dataset.batching_method == "random" and seen < expected - dropped:
            found = f"an epoch of this rank ended after {seen:,} of {expected:,} samples"
            where = ", ".join(stream.where for stream in dataset.streams)
            raise StreamError.of("", "samples-missing", where, found, "please report this")


def end_with_parent(worker_id: int) -> None:
    """Let a loader's worker end when the training process does, even by SIGKILL: it may be waiting for a shard."""
    parent = multiprocessing.parent_process()
    pid = os.getppid() if parent is None else parent.pid

    def watch() -> None:
        while os.getppid() == pid:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def build_dataloader(
    *,
    dataset: Mapping[str, Any],
    global_batch_size: int,
    max_tokens_per_microbatch: int | None = None,
    loss_average: str = "token",
    drop_last: bool = False,
    num_workers: int = 4,
    prefetch_factor: int | None = 2,
    persistent_workers: bool = True,
    pin_memory: bool = True,
    timeout: int | float = 0,
    tokenizer: PreTrainedTokenizerBase,
    num_image_tokens: int | Callable[[int], int],
    image_size: int,
    mean: tuple[float, ...],
) -> DataSpec:
    """A loader of padding-free batches.

    Args:
        dataset: Keywords of `ConversationDataset` and `streaming.StreamingDataset`.
        global_batch_size: Samples in a step over all ranks; the ranks must divide it.
        max_tokens_per_microbatch: Most tokens in one forward pass of a rank; bounds the memory. None for one pass.
        loss_average: See `PackedCollator`.
        drop_last: Leave out an epoch's last, smaller batch.
        num_workers: Processes a rank that read, decode and tokenize.
        prefetch_factor: Batches each of them prepares ahead.
        persistent_workers: Keep them from epoch to epoch.
        pin_memory: Page-locked batches, which copy faster to a GPU; without effect where there is none.
        timeout: Seconds to wait for a batch before giving up; 0 waits for as long as dataset.fault_timeout allows.
        tokenizer: Of the language model.
        num_image_tokens: Asked of the model.
        image_size: Of the vision encoder, pixels.
        mean: Of the vision encoder's normalisation; padding has its colour.

    Raises:
        ValueError: The ranks don't divide the batch, or a sample may be longer than a microbatch.
    """
    world_size = dist.get_world_size()
    if global_batch_size % world_size:
        raise ValueError(
            f"global_batch_size={global_batch_size} can't be divided by {world_size} ranks; "
            f"take {max(1, global_batch_size // world_size) * world_size}, or another number of ranks"
        )
    max_seq_len = dataset.get("max_seq_len", 4096)
    if max_tokens_per_microbatch is not None and max_tokens_per_microbatch < max_seq_len:
        raise ValueError(
            f"max_tokens_per_microbatch={max_tokens_per_microbatch} is less than dataset.max_seq_len={max_seq_len}: "
            "a single sample may not fit; raise the one or lower the other"
        )
    samples = ConversationDataset(
        **dataset,
        tokenizer=tokenizer,
        num_image_tokens=num_image_tokens,
        image_size=image_size,
        pad_color=pad_color_of(mean),
        batch_size=global_batch_size // world_size,
    )
    loader = WholeEpochLoader(
        samples,
        batch_size=global_batch_size // world_size,
        collate_fn=PackedCollator(max_tokens_per_microbatch, loss_average),
        drop_last=drop_last,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        persistent_workers=persistent_workers and num_workers > 0,
        pin_memory=pin_memory and torch.cuda.is_available(),
        timeout=timeout if num_workers else 0,
        worker_init_fn=end_with_parent,
    )
    return DataSpec(
        loader,
        split_batch=split_batch,
        get_num_samples_in_batch=lambda batch: len(batch["num_images"]),
        get_num_tokens_in_batch=lambda batch: {
            "total": len(batch["input_ids"]),
            "loss_generating": batch["loss_weight"],
        },
    )


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
