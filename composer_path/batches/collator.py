"""Padding-free batches: samples lie in one row, bin by bin, and microbatches are views of it.

A batch is a dict:

| key | type | what |
|---|---|---|
| input_ids | int64 [tokens] | vocabulary ids, negative where an image stands |
| position_ids | int64 [tokens] | restart at 0 with each sample |
| labels | int64 [tokens] | shifted inside each sample: the token to predict here, or IGNORE_INDEX |
| cu_seq_lens | int32 [samples + 1] | borders of the samples |
| max_seq_len | int | of the longest sample |
| supervised_index | int64 [targets] | positions with a label |
| targets | int64 [targets] | those labels |
| target_weights | float32 [targets] | what each counts in the loss |
| loss_weight | float | their sum |
| image_index | int64 [placeholders] | positions of image placeholders |
| pixel_values | uint8 [images, 3, height, width] | not normalised; or, of a set that holds them, instead |
| image_features | bf16 [images, image tokens, dim] | what the vision encoder makes of them |
| is_he | bool [images] | stained with haematoxylin and eosin |
| image_sample_ids | int64 [images] | the sample each image belongs to |
| sample_ids, num_images, num_targets, num_placeholders | int64 [samples] | of each sample |
| samples_per_bin | list of int | where the row is cut into microbatches |
| sources, problems | lists | per sample: its source; why it can't be used, or None |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from torch.utils.data import get_worker_info

from composer_path.batches.dataset import Sample
from composer_path.batches.microbatches import Batch, fewest_bins
from composer_path.batches.sending import SentBatch
from composer_path.records.tokenize import IGNORE_INDEX

LOSS_AVERAGES = ("token", "sample", "square", "rank")


class PackedCollator:
    """Lays samples into one row.

    Args:
        max_tokens_per_microbatch: Limit of a bin, in tokens; None for a single bin. A longer sample has its own.
        loss_average: What a target weighs: `token` all the same; `sample` each sample the same; `square` a sample by
            the square root of its answers' length; `rank` the reference's mean of per-rank means, which alone depends
            on how samples are split over ranks.
    """

    def __init__(self, max_tokens_per_microbatch: int | None = None, loss_average: str = "token") -> None:
        if loss_average not in LOSS_AVERAGES:
            raise ValueError(f"loss_average: unknown '{loss_average}'; choose one of {', '.join(LOSS_AVERAGES)}")
        self.max_tokens_per_microbatch = max_tokens_per_microbatch
        self.loss_average = loss_average

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """One device batch of N samples as one row."""
        bins = fewest_bins([len(sample["input_ids"]) for sample in samples], self.max_tokens_per_microbatch)
        ordered = [samples[index] for indices in bins for index in indices]
        input_ids = torch.cat([sample["input_ids"] for sample in ordered])
        labels = torch.cat([shift_labels(sample["labels"]) for sample in ordered])
        lengths = torch.tensor([len(sample["input_ids"]) for sample in ordered])
        supervised_index = (labels != IGNORE_INDEX).nonzero()[:, 0]
        num_targets = _count_per_sample(supervised_index, lengths)
        image_index = (input_ids < 0).nonzero()[:, 0]
        images = "image_features" if "image_features" in ordered[0] else "pixel_values"
        num_images = torch.tensor([len(sample["is_he"]) for sample in ordered])
        sample_ids = torch.tensor([sample["sample_id"] for sample in ordered])
        weights = target_weights(num_targets, self.loss_average)
        source_weights = torch.tensor([sample.get("loss_weight", 1.0) for sample in ordered])
        weights = weights * source_weights.repeat_interleave(num_targets)
        batch = {
            "input_ids": input_ids,
            "position_ids": torch.cat([torch.arange(length) for length in lengths.tolist()]),
            "labels": labels,
            "cu_seq_lens": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32),
            "max_seq_len": int(lengths.max()),
            "supervised_index": supervised_index,
            "targets": labels[supervised_index],
            "target_weights": weights,
            "loss_weight": float(weights.double().sum()),
            "image_index": image_index,
            "is_he": torch.cat([sample["is_he"] for sample in ordered]),
            "image_sample_ids": sample_ids.repeat_interleave(num_images),
            "sample_ids": sample_ids,
            "num_images": num_images,
            "num_targets": num_targets,
            "num_placeholders": _count_per_sample(image_index, lengths),
            "samples_per_bin": [len(indices) for indices in bins],
            "sources": [sample["source"] for sample in ordered],
            "problems": [sample["problem"] for sample in ordered],
        }
        pixels: list[Tensor] = [sample[images] for sample in ordered]  # type: ignore[literal-required]
        return batch | {images: torch.cat(pixels)} if get_worker_info() is None else SentBatch(batch, images, pixels)


def shift_labels(labels: Int64[Tensor, " tokens"]) -> Int64[Tensor, " tokens"]:
    """The label of each position is the next token's; the last position predicts nothing."""
    return torch.cat([labels[1:], labels.new_full((1,), IGNORE_INDEX)])


def target_weights(num_targets: Int64[Tensor, " samples"], loss_average: str) -> Float32[Tensor, " targets"]:
    """What each target counts in the loss, see `PackedCollator`."""
    counts = num_targets.clamp(min=1).double()
    if loss_average == "rank":
        per_sample = torch.full_like(counts, 1.0 / max(1, int(num_targets.sum())))
    else:
        per_sample = {"token": torch.ones_like(counts), "sample": 1 / counts, "square": counts.rsqrt()}[loss_average]
    return per_sample.repeat_interleave(num_targets).float()


def _count_per_sample(
    index: Int64[Tensor, " positions"], lengths: Int64[Tensor, " samples"]
) -> Int64[Tensor, " samples"]:
    """How many of the row's positions fall into each sample."""
    sample = torch.bucketize(index, lengths.cumsum(0), right=True)
    return torch.bincount(sample, minlength=len(lengths))
