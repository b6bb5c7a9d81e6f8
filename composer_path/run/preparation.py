"""How a configuration prepares text and images, where no dataset is built that could be asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from composer_path.batches.mixture import asking_template, given, template_of
from composer_path.images.pixels import ImagePreparation, pad_color_of
from composer_path.models.vision_encoder import VisionEncoder
from composer_path.records.prompts import PromptTemplate
from composer_path.records.tokenize import TextPreparation


def asking_text(dataset: Mapping[str, Any], num_image_tokens: int) -> TextPreparation:
    """How a model is asked that is trained on a dataset.

    Args:
        dataset: The section of the complete configuration.
        num_image_tokens: Placeholders of an image.

    Raises:
        ValueError: Streams have several templates and none is named for asking.
    """
    return _text(dataset, asking_template(dataset["template"], dataset["streams"]), num_image_tokens)


def text_of_sources(
    dataset: Mapping[str, Any], num_image_tokens: int
) -> Iterator[tuple[str, Mapping[str, Any], TextPreparation]]:
    """Name (empty for a single set), keywords and preparation of each stream of a dataset."""
    for name, own in (dataset["streams"] or {"": {}}).items():
        keywords = {**dataset, **given(own)}
        template = template_of(keywords["template"], own.get("system"))
        yield name, keywords, _text(dataset, template, num_image_tokens)


def images_of(dataset: Mapping[str, Any], encoder: VisionEncoder) -> ImagePreparation:
    """How images are prepared for an encoder."""
    settings = {key: dataset[key] for key in ("fit", "decoder", "max_pixels")}
    return ImagePreparation(encoder.image_size, pad_color=pad_color_of(encoder.mean), **settings)


def _text(dataset: Mapping[str, Any], template: PromptTemplate, num_image_tokens: int) -> TextPreparation:
    return TextPreparation(template, num_image_tokens, dataset["max_seq_len"], dataset["image_position"])
