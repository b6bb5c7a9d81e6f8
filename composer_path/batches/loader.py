"""Data loader for Composer: batches, how they are split into microbatches, and how samples and tokens are counted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from composer.core import DataSpec
from composer.utils import dist
from transformers import PreTrainedTokenizerBase

from composer_path.batches.balance import Balance
from composer_path.batches.batch import LossAverage, PackedCollator, split_batch
from composer_path.batches.dataset import ConversationDataset
from composer_path.batches.microbatches import run_device
from composer_path.batches.whole_epoch import WholeEpochLoader
from composer_path.images.pixels import pad_color_of
from composer_path.parallel import end_with_parent, heed_only_parent, keep_freed_memory

log = logging.getLogger(__name__)


def start_worker(worker_id: int) -> None:
    """What each of a loader's processes does first."""
    heed_only_parent()  # first: later threads leave the signal to it, too
    end_with_parent(worker_id)
    keep_freed_memory()


def build_dataloader(
    *,
    dataset: Mapping[str, Any],
    global_batch_size: int,
    max_tokens_per_microbatch: int | None = None,
    loss_average: LossAverage = "token",
    balance: Balance | None = "auto",
    lengths: str | None = None,
    drop_last: bool = False,
    num_workers: int = 4,
    prefetch_factor: int | None = 2,
    persistent_workers: bool = True,
    pin_memory: bool = True,
    timeout: int | float = 600,
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
        balance: Exchange samples inside each global batch so that ranks have equally many tokens: `node` with the
            ranks of a node, `global` with all, by measured lengths; `auto` does it where those are there, with all
            ranks unless a set has a remote; None leaves samples where they were drawn.
        lengths: Folder or URL of the lengths; None for beside each set.
        drop_last: Leave out an epoch's last, smaller batch; other samples in each epoch.
        num_workers: Processes a rank that read, decode and tokenize.
        prefetch_factor: Batches each of them prepares ahead.
        persistent_workers: Keep them from epoch to epoch.
        pin_memory: Page-locked batches, which copy faster to a GPU; without effect where there is none.
        timeout: Seconds to wait for a batch before giving up, as where a worker is frozen; 0 waits for ever.
        tokenizer: Of the language model.
        num_image_tokens: Asked of the model.
        image_size: Of the vision encoder, pixels.
        mean: Of the vision encoder's normalisation; padding has its colour.

    Raises:
        ValueError: The ranks don't divide the batch, or a sample may be longer than a microbatch.
        LengthsError: `node` or `global` without lengths that fit tokenizer, template, encoder and set.
    """
    world_size = dist.get_world_size()
    if global_batch_size % world_size:
        raise ValueError(
            f"global_batch_size={global_batch_size} can't be divided by {world_size} ranks; "
            f"take {max(1, global_batch_size // world_size) * world_size}, or another number of ranks"
        )
    batch_size = global_batch_size // world_size
    samples = ConversationDataset(
        **dataset,
        tokenizer=tokenizer,
        num_image_tokens=num_image_tokens,
        image_size=image_size,
        pad_color=pad_color_of(mean),
        batch_size=batch_size,
        drop_last=drop_last,
    )
    if dist.get_global_rank() == 0:
        log.info(samples.describe_epoch())
    longest = samples.sources[0].text.max_seq_len
    if max_tokens_per_microbatch is not None and longest is not None and max_tokens_per_microbatch < longest:
        raise ValueError(
            f"max_tokens_per_microbatch={max_tokens_per_microbatch} is less than dataset.max_seq_len={longest}: "
            "a single sample may not fit; raise the one or lower the other"
        )
    if balance == "auto":
        samples.balance_if_measured(lambda: samples.stored_lengths(lengths))
    elif balance is not None:
        samples.balance(samples.stored_lengths(lengths), balance)  # on every rank, so that all refuse what doesn't fit
    loader = WholeEpochLoader(
        samples,
        batch_size=batch_size,
        collate_fn=PackedCollator(max_tokens_per_microbatch, loss_average),
        num_workers=num_workers,
        prefetch_factor=prefetch_factor if num_workers else None,
        persistent_workers=persistent_workers and num_workers > 0,
        pin_memory=pin_memory and torch.cuda.is_available(),
        timeout=timeout,
        worker_init_fn=start_worker,
    )
    return DataSpec(
        loader,
        split_batch=split_batch,
        # Composer itself moves tensors in dicts and lists only.
        microbatch_transforms=lambda batch: batch.to(run_device()),
        get_num_samples_in_batch=lambda batch: batch.num_samples,
        get_num_tokens_in_batch=lambda batch: {"total": len(batch.input_ids), "loss_generating": batch.loss_weight},
    )
