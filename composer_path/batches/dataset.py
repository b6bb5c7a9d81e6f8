"""Shards to training samples: each record is decoded, put into its prompt, tokenized and labelled as it is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from composer_path.batches.balance import BalancedStreamingDataset
from composer_path.batches.batch import Sample
from composer_path.batches.mixture import Source, build_streams, check_streams
from composer_path.images.features import FeaturesError, common_features, is_features, unpack_features
from composer_path.images.pixels import PAD_COLOR, ImageError, load_stored_image
from composer_path.images.square import Square, is_square, unpack_square
from composer_path.records.conversation import Conversation
from composer_path.records.prompts import TemplateError, get_template
from composer_path.records.tokenize import IGNORE_INDEX, tokenize_conversation
from composer_path.shards.columns import COLUMNS, image_views
from composer_path.shards.lengths import lengths_key, lengths_place, read_lengths
from composer_path.stream.cache import INDEX
from composer_path.stream.guarded_stream import GuardedStream


class ConversationDataset(BalancedStreamingDataset):
    """Conversations over images, streamed from MDS shards on disk or in a bucket, or from a mixture of several.

    Args:
        tokenizer: Of the language model.
        num_image_tokens: How many placeholders an image takes.
        image_size: Side of the square the vision encoder sees, pixels.
        pad_color: What `fit: pad` fills up with.
        template: Prompt template, see `composer_path.records.prompts`.
        max_seq_len: Samples are cut at this many tokens, images included, never inside an image.
        image_position: `front` of the turn, or `inline` where the tags are.
        fit: `pad` to a square, or `crop` the centre.
        decoder: `pil` is exact, `torchvision` about twice as fast and within a grey level.
        max_pixels: Larger images are refused; None for the default of `load_image`.
        streams: A mixture: name -> keywords of `composer_path.batches.mixture.build_stream`, in place of `local`.
        **streaming: Keywords of `GuardedStreamingDataset` and `streaming.StreamingDataset`, passed through.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        num_image_tokens: int | Callable[[int], int],
        image_size: int,
        pad_color: tuple[int, int, int] = PAD_COLOR,
        template: str | Mapping[str, Any] = "plain",
        max_seq_len: int = 4096,
        image_position: Literal["front", "inline"] = "front",
        fit: Literal["pad", "crop"] = "pad",
        decoder: Literal["pil", "torchvision"] = "pil",
        max_pixels: int | None = None,
        streams: Mapping[str, Mapping[str, Any]] | None = None,
        **streaming: Any,
    ) -> None:
        self.sources = [Source(None, get_template(template))]
        if streams is not None:
            check_streams(streams)
            streaming["streams"], self.sources = build_streams(streams, template)
        super().__init__(**streaming)
        self.tokenizer = tokenizer
        self.num_image_tokens = num_image_tokens
        self.max_seq_len = max_seq_len
        self.image_position = image_position
        self.image_keywords: dict[str, Any] = {"image_size": image_size, "fit": fit, "decoder": decoder}
        self.image_keywords |= {"pad_color": pad_color} | ({} if max_pixels is None else {"max_pixels": max_pixels})
        self._square = Square.of(image_size, fit, pad_color)
        self.features = common_features({stream.where: self._index_of(stream) for stream in self.streams})
        for shard in self.shards:
            columns = getattr(shard, "column_names", [])
            if not set(COLUMNS) <= set(columns):
                raise ValueError(
                    f"shards must have the columns {', '.join(COLUMNS)}, found {', '.join(columns)}; write them with "
                    "data_prep/convert.py"
                )

    def get_item(self, sample_id: int | np.integer, retry: int = 7) -> Sample:
        """The sample at a position of the stream; iterating and indexing come through here."""
        return self.to_sample(super().get_item(sample_id, retry), int(sample_id))

    def to_sample(self, record: Mapping[str, Any], sample_id: int) -> Sample:
        """Make a sample of a shard's record; one that can't be used keeps its slot, with no label and the reason."""
        try:
            images = image_views(record["images"])
            conversation = Conversation.from_shard(record["conversation"], num_images=len(images))
        except ValueError as error:  # the shard is damaged here
            return self._unusable(sample_id, record, str(error))
        source = self._source(sample_id)
        try:
            tokens = tokenize_conversation(
                conversation,
                self.tokenizer,
                source.template,
                self.num_image_tokens,
                self.max_seq_len,
                self.image_position,
            )
            if not tokens.num_answer_tokens:
                return self._unusable(sample_id, record, f"no answer is left within max_seq_len={self.max_seq_len}")
            seen = [self._load(image) for image in images[: tokens.num_images]]
        except (TemplateError, ImageError) as error:
            return self._unusable(sample_id, record, str(error))
        sample = Sample(
            sample_id=sample_id,
            input_ids=tokens.input_ids,
            labels=tokens.labels,
            is_he=torch.full((len(seen),), is_hematoxylin_eosin(record["metadata"].get("stain")), dtype=torch.bool),
            source=source.name or _source_of(record),
            problem=None,
            loss_weight=source.loss_weight,
        )
        return self._with_images(sample, seen)

    def _unusable(self, sample_id: int, record: Mapping[str, Any], problem: str) -> Sample:
        """One token without a label: it costs next to nothing and weighs nothing."""
        sample = Sample(
            sample_id=sample_id,
            input_ids=torch.zeros(1, dtype=torch.int64),
            labels=torch.full((1,), IGNORE_INDEX, dtype=torch.int64),
            is_he=torch.zeros(0, dtype=torch.bool),
            source=self._source(sample_id).name or _source_of(record),
            problem=problem,
        )
        return self._with_images(sample, [])

    def _source(self, sample_id: int) -> Source:
        """The stream that a position belongs to."""
        shard_id, _ = self._find(sample_id)
        return self.sources[int(self.stream_per_shard[shard_id])]

    def _load(self, image: memoryview) -> Tensor:
        """The pixels of a stored image, or its features."""
        if is_features(image) != (self.features is not None):
            if self.features is None:
                raise FeaturesError(
                    "the shards hold features, but their index.json doesn't say so; take the one that encode.py wrote"
                )
            load_stored_image(
                bytes(image), **self.image_keywords
            )  # encode.py leaves a file that can't be decoded as it is
            raise FeaturesError("a set of features holds an image file; encode the set again")
        if self.features is not None:
            return unpack_features(image, self.features)
        if is_square(image):
            return unpack_square(image, self._square)
        return load_stored_image(bytes(image), **self.image_keywords)

    def _with_images(self, sample: Sample, seen: list[Tensor]) -> Sample:
        """A sample with its pixels or features; none is none of the right shape."""
        if self.features is not None:
            empty = torch.empty((0, self.features.num_tokens, self.features.dim), dtype=torch.bfloat16)
            sample["image_features"] = _stacked(seen) if seen else empty
        else:
            size = self.image_keywords["image_size"]
            sample["pixel_values"] = _stacked(seen) if seen else torch.empty((0, 3, size, size), dtype=torch.uint8)
        return sample

    def _index_of(self, stream: GuardedStream) -> bytes:
        return (stream.folder / INDEX).read_bytes()

    def stored_lengths(self, folder: str | None = None) -> Integer[np.ndarray, " samples"]:
        """Tokens of each sample, by its position in the stream, as `data_prep/measure_lengths.py` found them.

        Args:
            folder: Where they lie; None for beside each set.

        Raises:
            LengthsError: They were not measured, or for another tokenizer, template, encoder or set.
        """
        found = []
        for stream, source, num_samples in zip(self.streams, self.sources, self.samples_per_stream, strict=True):
            key = lengths_key(
                self._index_of(stream),
                self.tokenizer,
                source.template,
                self.num_image_tokens,
                self.max_seq_len,
                self.image_position,
            )
            found.append(read_lengths(lengths_place(stream.where, folder), key, int(num_samples)).tokens)
        return np.concatenate(found)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where to go on.

        At an epoch's end Composer asks for 0 samples while Streaming still stores the finished epoch, whose order the
        next one would then repeat; the state then names the next epoch. (A state that was loaded but not used yet
        names the epoch to come itself.)
        """
        state = super().state_dict(num_samples, from_beginning)
        if num_samples == 0 and from_beginning:
            state["epoch"] = max(state["epoch"], self.next_epoch)
        return state


def _stacked(seen: list[Tensor]) -> Tensor:
    """Images of a sample in one tensor; a single one isn't copied."""
    return seen[0][None] if len(seen) == 1 else torch.stack(seen)


def is_hematoxylin_eosin(stain: str | None) -> bool:
    """Whether a record's stain is named as H&E; a record that doesn't say so doesn't count."""
    pattern = r"h(a?ematoxylin)?\W*(and|&|\+)?\W*e(osin)?"
    return stain is not None and re.fullmatch(pattern, stain.strip().lower()) is not None


def _source_of(record: Mapping[str, Any]) -> str:
    return str(record["metadata"].get("source") or "all")
