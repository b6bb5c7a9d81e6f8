"""A batch: samples lie in one row, bin by bin, no padding between them, and microbatches are views of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NotRequired, TypedDict, get_args

import torch
from jaxtyping import BFloat16, Bool, Float, Float32, Int, Int32, Int64, UInt8
from torch import Tensor
from torch.utils.data import get_worker_info

from composer_path.batches.microbatches import add_cuts, agree_over_ranks, cap_bins, fewest_bins
from composer_path.batches.sending import in_one_piece, pack, unpack
from composer_path.batches.target_weights import LossAverage, label_weights, target_weights
from composer_path.records.tokenize import IGNORE_INDEX
from composer_path.records.wording import Wording

Pixels = UInt8[Tensor, "images 3 height width"] | Float[Tensor, "images 3 height width"]


class Sample(TypedDict):
    """One conversation, ready to be laid into a row."""

    sample_id: int  # its position in the stream; -1: none, this is a stand-in where a step has no sample for a rank
    input_ids: Int64[Tensor, " tokens"]
    labels: Int64[Tensor, " tokens"]  # not shifted
    label_weights: NotRequired[Float32[Tensor, " tokens"]]  # what each label counts, not shifted; 1 if it isn't there
    pixel_values: NotRequired[UInt8[Tensor, "images 3 height width"]]
    image_features: NotRequired[BFloat16[Tensor, "images image_tokens dim"]]  # in their place, where a set holds them
    is_he: Bool[Tensor, " images"]  # haematoxylin and eosin, where the record says so
    wording: NotRequired[Wording]  # what the text speaks of; nothing if it isn't there
    repetition: NotRequired[int]  # how often the epoch had it before
    source: str  # the stream's name, or the record's own source
    problem: str | None  # why it can't be trained on; it then keeps its slot with weight 0
    loss_weight: NotRequired[float]  # of its source; 1 if it isn't there


class EmptyBatchError(ValueError):
    """A global batch without a single answer token: there is nothing to learn from and nothing to divide by."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """A row of samples. It is replaced (`dataclasses.replace`), never changed in place.

    Its fields are a table, which cutting, sending and moving follow. `per` says of what each has one entry; `batch` is
    a value of the whole. An `index` counts positions of the row.
    """

    # Vocabulary ids, negative where an image stands; positions restart at 0 with each sample. Labels are shifted inside
    # each sample: the token to predict here, or IGNORE_INDEX.
    input_ids: Int64[Tensor, " tokens"] = field(metadata={"per": "token"})
    position_ids: Int64[Tensor, " tokens"] = field(metadata={"per": "token"})
    labels: Int64[Tensor, " tokens"] = field(metadata={"per": "token"})
    # Where samples begin and end; where a label is, and where an image's placeholder.
    cu_seq_lens: Int32[Tensor, " borders"] = field(metadata={"per": "border", "index": True})
    supervised_index: Int64[Tensor, " targets"] = field(metadata={"per": "target", "index": True})
    image_index: Int64[Tensor, " placeholders"] = field(metadata={"per": "placeholder", "index": True})
    # The labels there, and what each counts in the loss.
    targets: Int64[Tensor, " targets"] = field(metadata={"per": "target"})
    target_weights: Float32[Tensor, " targets"] = field(metadata={"per": "target"})
    # Pixels (uint8 if not normalised), or in their place what the vision encoder makes of them; whether the stain is
    # haematoxylin and eosin; the sample of each.
    pixel_values: Pixels | None = field(default=None, metadata={"per": "image"})
    image_features: Float[Tensor, "images image_tokens dim"] | None = field(default=None, metadata={"per": "image"})
    is_he: Bool[Tensor, " images"] = field(metadata={"per": "image"})
    image_sample_ids: Int64[Tensor, " images"] = field(metadata={"per": "image"})
    # Of each image: whether its sample's text speaks of directions, or of sizes.
    names_direction: Bool[Tensor, " images"] = field(metadata={"per": "image"})
    names_size: Bool[Tensor, " images"] = field(metadata={"per": "image"})
    # Of each sample: its id, how often the epoch had it before, counts, source, and why it can't be used.
    sample_ids: Int64[Tensor, " samples"] = field(metadata={"per": "sample"})
    repetitions: Int64[Tensor, " samples"] = field(metadata={"per": "sample"})
    num_images: Int64[Tensor, " samples"] = field(metadata={"per": "sample"})
    num_targets: Int64[Tensor, " samples"] = field(metadata={"per": "sample"})
    num_placeholders: Int64[Tensor, " samples"] = field(metadata={"per": "sample"})
    sources: list[str] = field(metadata={"per": "sample"})
    problems: list[str | None] = field(metadata={"per": "sample"})
    # The longest sample's length, the sum of the targets' weights, and where the row is cut into microbatches.
    max_seq_len: int = field(metadata={"per": "batch"})
    loss_weight: float = field(metadata={"per": "batch"})
    samples_per_bin: list[int] = field(metadata={"per": "batch"})

    def sizes(self) -> tuple[list[int], int, int]:
        """Tokens of each sample, images, and answer tokens; asked of a batch on the CPU."""
        return torch.diff(self.cu_seq_lens).tolist(), len(self.is_he), len(self.targets)

    @property
    def num_samples(self) -> int:
        """How many samples it has; a stand-in is none."""
        return int((self.sample_ids >= 0).sum())

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, as torch's DataLoader asks for it."""
        return self._with_tensors(Tensor.pin_memory)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; the host doesn't wait for a copy from page-locked memory."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def cut(self, start: int, stop: int) -> Batch:
        """Samples start to stop as a batch of their own; its tensors are views but for the shifted indices.

        Everything lies on the CPU still: each microbatch is moved to the device when its turn has come. So nothing
        here waits for the device.
        """
        first, last = self.cu_seq_lens[[start, stop]].tolist()
        entries = {"token": slice(first, last), "border": slice(start, stop + 1), "sample": slice(start, stop)}
        counts = {"target": self.num_targets, "placeholder": self.num_placeholders, "image": self.num_images}
        for what, count in counts.items():
            entries[what] = slice(int(count[:start].sum()), int(count[:stop].sum()))
        part: dict[str, Any] = {}
        for column in fields(self):
            values = getattr(self, column.name)
            if values is not None and column.metadata["per"] != "batch":
                values = values[entries[column.metadata["per"]]]
                part[column.name] = _shifted(values, first) if "index" in column.metadata else values
        part["max_seq_len"] = int(torch.diff(part["cu_seq_lens"]).max())
        part["loss_weight"] = float(part["target_weights"].double().sum())
        return replace(self, **part, samples_per_bin=[stop - start])

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changed)  # type: ignore[arg-type]

    def __getstate__(self) -> tuple[Any, ...]:
        """What is sent to another process: one piece of memory, if the batch lies in one."""
        return pack(vars(self))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        vars(self).update(unpack(*state))

    def __deepcopy__(self, memo: Any) -> Batch:
        """Itself, as it never changes: Composer asks for a copy of every microbatch on the device."""
        return self


def split_batch(batch: Batch, microbatch_size: int | float) -> list[Batch]:
    """Cut a row into microbatches, as many on every rank: under FSDP each is a collective forward pass.

    None has more samples than `microbatch_size`; Composer hands over the device batch size.

    Raises:
        EmptyBatchError: No rank has an answer token.
    """
    counts = cap_bins(batch.samples_per_bin, int(microbatch_size))
    num_bins, largest_weight = agree_over_ranks(len(counts), batch.loss_weight)
    if largest_weight == 0:
        problems = sorted({problem for problem in batch.problems if problem})
        raise EmptyBatchError(
            f"a batch of {len(batch.sample_ids)} samples a rank has no answer token at all (samples "
            f"{batch.sample_ids.tolist()[:8]} here{': ' + '; '.join(problems[:3]) if problems else ''}); "
            "raise max_seq_len, or convert the data again without such records"
        )
    counts = add_cuts(counts, batch.cu_seq_lens.tolist(), num_bins)
    if len(counts) == 1:
        return [batch]
    starts = [sum(counts[:at]) for at in range(len(counts))]
    return [batch.cut(start, start + count) for start, count in zip(starts, counts, strict=True)]


class PackedCollator:
    """Lays samples into one row.

    Args:
        max_tokens_per_microbatch: Limit of a bin, in tokens; None for a single bin. A longer sample has its own.
        loss_average: What a target weighs: `token` all the same; `sample` each sample the same; `square` a sample by
            the square root of its answers' length; `rank` the reference's mean of per-rank means, which alone depends
            on how samples are split over ranks.
    """

    def __init__(self, max_tokens_per_microbatch: int | None = None, loss_average: LossAverage = "token") -> None:
        if loss_average not in get_args(LossAverage):
            known = ", ".join(get_args(LossAverage))
            raise ValueError(f"loss_average: unknown '{loss_average}'; choose one of {known}")
        self.max_tokens_per_microbatch, self.loss_average = max_tokens_per_microbatch, loss_average

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """One device batch of N samples as one row."""
        bins = fewest_bins([len(sample["input_ids"]) for sample in samples], self.max_tokens_per_microbatch)
        ordered = [samples[index] for indices in bins for index in indices]
        input_ids = torch.cat([sample["input_ids"] for sample in ordered])
        labels = torch.cat([shift_labels(sample["labels"]) for sample in ordered])
        lengths = torch.tensor([len(sample["input_ids"]) for sample in ordered])
        supervised_index = (labels != IGNORE_INDEX).nonzero()[:, 0]
        num_targets = _per_sample(supervised_index, lengths)
        image_index = (input_ids < 0).nonzero()[:, 0]
        num_images = torch.tensor([len(sample["is_he"]) for sample in ordered])
        sample_ids = torch.tensor([sample["sample_id"] for sample in ordered])
        spoken = torch.tensor([sample.get("wording", Wording(False, False)) for sample in ordered])
        source_weights = torch.tensor([sample.get("loss_weight", 1.0) for sample in ordered])
        weights = target_weights(num_targets, self.loss_average, label_weights(ordered, supervised_index))
        weights *= source_weights.repeat_interleave(num_targets)
        row = {
            "input_ids": input_ids,
            "position_ids": torch.cat([torch.arange(length) for length in lengths.tolist()]),
            "labels": labels,
            "cu_seq_lens": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32),
            "supervised_index": supervised_index,
            "targets": labels[supervised_index],
            "target_weights": weights,
            "image_index": image_index,
            "is_he": torch.cat([sample["is_he"] for sample in ordered]),
            "image_sample_ids": sample_ids.repeat_interleave(num_images),
            **{name: spoken[:, at].repeat_interleave(num_images) for at, name in enumerate(Wording._fields)},
            "sample_ids": sample_ids,
            "repetitions": torch.tensor([sample.get("repetition", 0) for sample in ordered]),
            "num_images": num_images,
            "num_targets": num_targets,
            "num_placeholders": _per_sample(image_index, lengths),
            "sources": [sample["source"] for sample in ordered],
            "problems": [sample["problem"] for sample in ordered],
            "max_seq_len": int(lengths.max()),
            "loss_weight": float(weights.double().sum()),
            "samples_per_bin": [len(indices) for indices in bins],
        }
        kind = "image_features" if "image_features" in ordered[0] else "pixel_values"
        images: list[Tensor] = [sample[kind] for sample in ordered]  # type: ignore[literal-required]
        together = get_worker_info() is not None  # in a worker, from which the batch will be sent
        return Batch(**(in_one_piece(row, kind, images) if together else row | {kind: torch.cat(images)}))


def shift_labels(labels: Int64[Tensor, " tokens"]) -> Int64[Tensor, " tokens"]:
    """The label of each position is the next token's; the last position predicts nothing."""
    return torch.cat([labels[1:], labels.new_full((1,), IGNORE_INDEX)])


def _per_sample(index: Int64[Tensor, " positions"], lengths: Int64[Tensor, " samples"]) -> Int64[Tensor, " samples"]:
    """How many of the row's positions fall into each sample."""
    sample = torch.bucketize(index, lengths.cumsum(0), right=True)
    return torch.bincount(sample, minlength=len(lengths))


def _shifted(index: Int[Tensor, " entries"], by: int) -> Int[Tensor, " entries"]:
    """An index counted from another start; page-locked if the row is, so that its copy to the device doesn't wait."""
    return torch.sub(index, by, out=torch.empty_like(index, pin_memory=index.is_pinned()))
