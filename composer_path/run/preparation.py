"""How a configuration prepares text and images, where no dataset is built that could be asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

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
    settings["scale_levels"] = bool(dataset["scale_levels"])  # a run's config.yaml says what its sets said
    return ImagePreparation(encoder.image_size, pad_color=pad_color_of(encoder.mean), **settings)


def note_levels(dataset: dict[str, Any], config: DictConfig, images: ImagePreparation) -> DictConfig:
    """Note in a dataset's section, and in a copy of its run's configuration, what its sets say of dark 16-bit pictures.

    An export reads it there: it sees no set.
    """
    if not images.scale_levels:
        return config
    dataset["scale_levels"] = True
    noted = OmegaConf.merge(config, {"train_loader": {"dataset": {"scale_levels": True}}})
    assert isinstance(noted, DictConfig)
    return noted
