"""Shards to training samples: each record is decoded, put into its prompt, tokenized and labelled as it is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from composer_path.batches.balance import BalancedStreamingDataset
from composer_path.batches.batch import Sample
from composer_path.batches.measure import lengths_key
from composer_path.batches.mixture import Source, Template, asking_template, build_streams, template_of
from composer_path.images.features import FeaturesError, common_features, is_features, unpack_features
from composer_path.images.levels import common_levels
from composer_path.images.pixels import Decoder, Fit, ImagePreparation
from composer_path.records.conversation import Conversation
from composer_path.records.prompts import TemplateError
from composer_path.records.rules import ImageError
from composer_path.records.segments import ImagePosition
from composer_path.records.tokenize import IGNORE_INDEX, TextPreparation, TokenizedConversation
from composer_path.records.vocabulary import text_encoder
from composer_path.records.wording import wording_of
from composer_path.shards.columns import COLUMNS, image_views
from composer_path.shards.lengths import lengths_place, read_lengths
from composer_path.stream.cache import INDEX
from composer_path.stream.guarded_stream import GuardedStream

Prepared = tuple[TokenizedConversation, list[Tensor], str | None]
# Of a record that can't be trained on: it costs next to nothing and weighs nothing.
NO_TOKENS = TokenizedConversation(torch.zeros(1, dtype=torch.int64), torch.full((1,), IGNORE_INDEX), num_images=0)


class ConversationDataset(BalancedStreamingDataset):
    """Conversations over images, streamed from MDS shards on disk or in a bucket, or from a mixture of several.

    Args:
        tokenizer: Of the language model.
        num_image_tokens: How many placeholders an image takes.
        image_size: Side of the square the vision encoder sees, pixels.
        pad_color: What `fit: pad` fills up with.
        template: Prompt template, see `composer_path.records.prompts`; None for `plain`. Of a mixture: that of streams
            that name none, and the one that the model is asked with; needed where streams have several.
        max_seq_len: See `TextPreparation`.
        image_position: Likewise.
        fit: See `ImagePreparation`.
        decoder: Likewise.
        max_pixels: Likewise; larger images are refused.
        scale_levels: Likewise; None for what the sets say that they were converted with.
        streams: A mixture: name -> keywords of `composer_path.batches.mixture.build_stream`, in place of `local`.
        **streaming: Keywords of `GuardedStreamingDataset` and `streaming.StreamingDataset`, passed through.

    Attributes:
        images: How its images are prepared.
        sources: How the text of each stream is.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        num_image_tokens: int | Callable[[int], int],
        image_size: int,
        pad_color: tuple[int, int, int] = ImagePreparation.pad_color,
        template: Template | None = None,
        max_seq_len: int = TextPreparation.max_seq_len,  # type: ignore[assignment]
        image_position: ImagePosition = TextPreparation.image_position,
        fit: Fit = ImagePreparation.fit,
        decoder: Decoder = ImagePreparation.decoder,
        max_pixels: int = ImagePreparation.max_pixels,
        scale_levels: bool | None = None,
        streams: Mapping[str, Mapping[str, Any]] | None = None,
        **streaming: Any,
    ) -> None:
        self.tokenizer = tokenizer
        self.images = ImagePreparation(image_size, fit, decoder, pad_color, max_pixels)
        text = TextPreparation(template_of(template), num_image_tokens, max_seq_len, image_position)
        self.sources = [Source(None, text)]
        if streams is not None:
            streaming["streams"], self.sources = build_streams(streams, template, text)
        self._asking = template, streams
        text_encoder(tokenizer)  # before workers are forked, each of which would build it again
        super().__init__(**streaming)
        indices = {stream.where: self._index_of(stream) for stream in self.streams}
        self.images = replace(self.images, scale_levels=common_levels(indices, scale_levels))
        self.features = common_features(indices)
        for columns in {tuple(getattr(shard, "column_names", ())) for shard in self.shards}:
            if not set(COLUMNS) <= set(columns):
                rule = f"shards must have the columns {', '.join(COLUMNS)}"
                raise ValueError(f"{rule}, found {', '.join(columns)}; write them with composer-path convert")

    @property
    def text(self) -> TextPreparation:
        """How text is prepared for a model that was trained on this data: what an export takes along.

        Raises:
            ValueError: Streams have several templates and none is named for asking.
        """
        return replace(self.sources[0].text, template=asking_template(*self._asking))

    def get_item(self, sample_id: int | np.integer, retry: int = 7) -> Sample:
        """The sample at a position of the stream; iterating and indexing come through here.

        A shard's bytes become a row, column by column, with `DECODERS` of shards/mds.py (by `SampleReader.read` of
        stream/open_shards.py); here the row becomes a sample.
        """
        return self.to_sample(super().get_item(sample_id, retry), int(sample_id))

    def to_sample(self, record: Mapping[str, Any], sample_id: int) -> Sample:
        """Make a sample of a shard's record; one that can't be used keeps its slot, with no label and the reason."""
        shard_id, _ = self._find(sample_id)
        source = self.sources[int(self.stream_per_shard[shard_id])]
        sample = self._sample(sample_id, source, self._prepare(record, source.text), record["metadata"])
        sample["wording"], sample["repetition"] = wording_of(record["conversation"]), self.repetition()
        return sample

    def stand_in(self) -> Sample:
        """In place of a sample that a step has for other ranks only; it weighs nothing and isn't counted."""
        return self._sample(-1, self.sources[0], (NO_TOKENS, [], None), {})

    def _sample(self, sample_id: int, source: Source, prepared: Prepared, metadata: Mapping[str, Any]) -> Sample:
        tokens, images, problem = prepared
        sample = Sample(
            sample_id=sample_id,
            input_ids=tokens.input_ids,
            labels=tokens.labels,
            is_he=torch.full((len(images),), is_hematoxylin_eosin(metadata.get("stain")), dtype=torch.bool),
            source=source.name or str(metadata.get("source") or "all"),
            problem=problem,
            loss_weight=source.loss_weight,
        )
        if tokens.weights is not None:
            sample["label_weights"] = tokens.weights
        if self.features is None:
            size = self.images.image_size
            sample["pixel_values"] = _stacked(images, torch.empty((0, 3, size, size), dtype=torch.uint8))
        else:
            none = torch.empty((0, self.features.num_tokens, self.features.dim), dtype=torch.bfloat16)
            sample["image_features"] = _stacked(images, none)
        return sample

    def _prepare(self, record: Mapping[str, Any], text: TextPreparation) -> Prepared:
        """A record's tokens, its images that weren't cut away, and why it can't be trained on."""
        try:
            images = image_views(record["images"])
            conversation = Conversation.from_shard(record["conversation"], num_images=len(images))
        except ValueError as error:  # the shard is damaged here
            return NO_TOKENS, [], str(error)
        try:
            tokens = text.tokenize(conversation, self.tokenizer)
            if not tokens.num_answer_tokens:
                return NO_TOKENS, [], f"no answer is left within max_seq_len={text.max_seq_len}"
            return tokens, [self._load(image) for image in images[: tokens.num_images]], None
        except (TemplateError, ImageError) as error:
            return NO_TOKENS, [], str(error)

    def _load(self, image: memoryview) -> Tensor:
        """The pixels of a stored image, or its features."""
        if self.features is None:
            if is_features(image):
                raise FeaturesError(
                    "the shards hold features, but their index.json doesn't say so; take the one that encode wrote"
                )
            return self.images.load_stored(image)
        if not is_features(image):
            self.images.load_stored(image)  # encode leaves a file that can't be decoded as it is: an ImageError
            raise FeaturesError("a set of features holds an image file; encode the set again")
        return unpack_features(image, self.features)

    def _index_of(self, stream: GuardedStream) -> bytes:
        return (stream.folder / INDEX).read_bytes()

    def stored_lengths(self, folder: str | None = None) -> Integer[np.ndarray, " samples"]:
        """Tokens of each sample, by its position in the stream, as they were measured.

        They lie in a folder, or (None) beside each set.

        Raises:
            LengthsError: They were not measured, or for another tokenizer, template, encoder or set.
        """
        found = []
        for stream, source, num_samples in zip(self.streams, self.sources, self.samples_per_stream, strict=True):
            key = lengths_key(self.tokenizer, source.text).of_set(self._index_of(stream))
            found.append(read_lengths(lengths_place(stream.where, folder), key, int(num_samples)).tokens)
        return np.concatenate(found)


def _stacked(images: list[Tensor], none: Tensor) -> Tensor:
    """Images of a sample in one tensor; a single one isn't copied, and none has its shape too."""
    return images[0][None] if len(images) == 1 else torch.stack(images) if images else none


def is_hematoxylin_eosin(stain: str | None) -> bool:
    """Whether a record's stain is named as H&E; a record that doesn't say so doesn't count."""
    pattern = r"h(a?ematoxylin)?\W*(and|&|\+)?\W*e(osin)?"
    return stain is not None and re.fullmatch(pattern, stain.strip().lower()) is not None
