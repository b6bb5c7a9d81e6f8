"""How a configuration prepares text and images, where no dataset is built that could be asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from composer_path.images.pixels import ImagePreparation, pad_color_of
from composer_path.models.vision_encoder import VisionEncoder
from composer_path.records.prompts import PromptTemplate
from composer_path.records.tokenize import TextPreparation


def text_of(dataset: Mapping[str, Any], template: PromptTemplate, num_image_tokens: int) -> TextPreparation:
    """How a dataset's section, with one of its templates, prepares text."""
    return TextPreparation(template, num_image_tokens, dataset["max_seq_len"], dataset["image_position"])


def images_of(dataset: Mapping[str, Any], encoder: VisionEncoder) -> ImagePreparation:
    """How it prepares images for an encoder."""
    settings = {key: dataset[key] for key in ("fit", "decoder", "max_pixels")}
    return ImagePreparation(encoder.image_size, pad_color=pad_color_of(encoder.mean), **settings)
