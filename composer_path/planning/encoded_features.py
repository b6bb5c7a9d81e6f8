"""Runs a set's images through the vision encoder once and stores its features; checks them before training.

Worth it where every image is used at least twice, see docs/batches.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from composer.core.precision import get_precision_context
from composer.utils import dist
from jaxtyping import BFloat16, UInt8
from torch import Tensor

from composer_path.images.features import (
    INDEX_KEY,
    FeaturesError,
    FeatureSet,
    features_in_index,
    is_features,
    pack_features,
)
from composer_path.images.pixels import ImagePreparation, normalize_image
from composer_path.models.parameters import cast_parameters
from composer_path.models.pattern import learning_modules
from composer_path.models.vision_encoder import VisionEncoder
from composer_path.parallel import in_threads
from composer_path.records.rules import ImageError
from composer_path.run.names import named_classes
from composer_path.run.precision import compute_dtype, settle_precision
from composer_path.run.preparation import images_of
from composer_path.shards.columns import pack_images, unpack_images
from composer_path.shards.index import INDEX_NAME, empty_place, new_set, publish_new
from composer_path.shards.mds import ShardError
from composer_path.shards.view import ShardView
from composer_path.weights.vision_file import build_vision_encoder, weights_hash

_SIZE_LIMIT = 2**28  # 160 images of the reference's encoder in a shard
_KEPT = ("format", "format_version", "composer_path", "source", "columns")
# A sample's columns, and each stored image with its pixels; None where it can't be decoded.
Decoded = tuple[dict[str, Any], list[tuple[bytes, UInt8[Tensor, "3 height width"] | None]]]


@dataclass
class EncodedSummary:
    """What was written."""

    samples: int = 0
    images: int = 0
    undecodable: int = 0
    bytes: int = 0

    def __str__(self) -> str:
        """One line."""
        left = f", {self.undecodable} that can't be decoded left as they are" if self.undecodable else ""
        return f"{self.samples:,} samples, {self.images:,} images{left}, {self.bytes / 1e9:.3f} GB of features"


@dataclass(frozen=True, eq=False)
class FeatureEncoder:
    """A vision encoder as training runs it, with how training prepares images for it."""

    vision_encoder: VisionEncoder  # frozen, in the dtype and on the device that it runs in
    images: ImagePreparation
    precision: str  # Composer's name of the one that training runs in

    def decode(self, image: bytes) -> UInt8[Tensor, "3 height width"] | None:
        """An image's pixels, as training sees them; None where they can't be had."""
        try:
            return self.images.load_stored(image)
        except ImageError:
            return None

    @torch.no_grad()
    def encode(self, pixels: UInt8[Tensor, "images 3 height width"]) -> BFloat16[Tensor, "images tokens dim"]:
        """Features of a batch of images, on the CPU."""
        encoder = self.vision_encoder
        device = next(encoder.parameters()).device
        images = normalize_image(pixels.to(device), mean=encoder.mean, std=encoder.std)
        with get_precision_context(self.precision) if device.type == "cuda" else contextlib.nullcontext():
            return encoder(images).to(torch.bfloat16).cpu()


def feature_set_of(encoder: VisionEncoder, images: ImagePreparation) -> FeatureSet:
    """What an encoder's features of images that are prepared so are known by."""
    return FeatureSet(
        encoder=encoder.config,
        weights=weights_hash(encoder),
        fit=images.fit,
        decoder=images.decoder,
        pad_color=list(images.pad_color),
        num_tokens=encoder.num_tokens(encoder.image_size, encoder.image_size),
        dim=encoder.dim,
    )


def build_feature_encoder(settings: Mapping[str, Any], device: str | None = None) -> FeatureEncoder:
    """The vision encoder of a configuration, with the same weights as in training; on a GPU where there is one.

    Raises:
        ValueError: The YAML trains the encoder, so its features would change.
    """
    if "vision_encoder" in learning_modules(settings["model"]):
        raise ValueError("model.trainable: vision_encoder learns in this run, so its features can't be stored")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    trainer = dict(settings["trainer"])
    settle_precision(trainer, "gpu" if device == "cuda" else device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings["seed"])  # random weights are those that `assemble_model` draws
        encoder = build_vision_encoder(**settings["model"]["vision_encoder"])
    cast_parameters(encoder, compute_dtype(trainer["precision"], trainer["parallelism_config"]))
    encoder.requires_grad_(False).to(device)
    return FeatureEncoder(encoder, images_of(settings["train_loader"]["dataset"], encoder), trainer["precision"])


def encode_set(
    view: ShardView,
    out: str,
    encoder: FeatureEncoder,
    batch_size: int = 32,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> EncodedSummary:
    """Write a set with features in place of its images; all else is copied bit for bit, in the same order.

    The new set has an index only when all of it is verified; a run that ends early leaves nothing. Threads decode
    images, of which `batch_size` are encoded together; `progress` gets the number of samples that are done.

    Raises:
        ShardError: The set can't be read or holds features already, or something lies at `out`.
        StorageError: The new set can't be written.
    """
    if features_in_index(view.place.read(INDEX_NAME)) is not None:
        raise ShardError(f"{view.place}: holds features already; encode the set of images that they were made of")
    place, summary = empty_place(out), EncodedSummary()
    with new_set(place, _SIZE_LIMIT, ["xxh64"]) as writer:
        for columns, stored in _encoded(view, encoder, batch_size, workers):
            writer.write(columns | {"images": pack_images(stored)})
            summary.samples += 1
            if progress is not None:
                progress(summary.samples)
            summary.images += len(stored)
            summary.undecodable += sum(not is_features(image) for image in stored)
            summary.bytes += sum(map(len, stored))
        features = {INDEX_KEY: feature_set_of(encoder.vision_encoder, encoder.images).to_json()}
        # What still holds of the old set's card, and how the features were made.
        card: dict[str, Any] = {key: view.card[key] for key in _KEPT if key in view.card}
        card |= {"records": summary.samples, "images": summary.images, "undecodable": summary.undecodable}
        publish_new(place, writer, card | features, view.index_keys | features)
    return summary


def _encoded(
    view: ShardView, encoder: FeatureEncoder, batch_size: int, workers: int
) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
    """Samples with what is stored of their images: features, or the file itself where it can't be decoded."""

    def decode(columns: dict[str, Any]) -> Decoded:
        return columns, [(image, encoder.decode(image)) for image in unpack_images(columns["images"])]

    samples = (columns for number in range(len(view.shards)) for _, columns in view.records(number))
    group: list[Decoded] = []
    # Two threads at least and two groups ahead: while one group is encoded, the next one is decoded.
    for sample in in_threads(decode, samples, max(2, workers), ahead=2 * batch_size + workers):
        group.append(sample)
        if sum(len(images) for _, images in group) >= batch_size or len(group) >= 8 * batch_size:
            yield from _finish(group, encoder, batch_size)
            group = []
    yield from _finish(group, encoder, batch_size)


def _finish(
    group: list[Decoded], encoder: FeatureEncoder, batch_size: int
) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
    good = [pixels for _, images in group for _, pixels in images if pixels is not None]
    batches = (torch.stack(good[at : at + batch_size]) for at in range(0, len(good), batch_size))
    features = (pack_features(of_image) for batch in batches for of_image in encoder.encode(batch))
    for columns, images in group:
        yield columns, [image if pixels is None else next(features) for image, pixels in images]


def check_features(dataset: Any, vision_encoder: VisionEncoder, algorithms: Iterable[str]) -> None:
    """Whether a dataset's stored features are those that this run's encoder would make; nothing is asked of images.

    Only rank 0 needs the encoder's weights; algorithms are those of the YAML, by name.

    Raises:
        FeaturesError: Another encoder, other image settings, an encoder that learns, or an algorithm that changes
            images; on all ranks.
    """
    if dataset.features is None:
        return
    found: list[str | None] = [None]
    if dist.get_global_rank() == 0:
        found[0] = _mismatch(dataset, vision_encoder, algorithms)
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(found, src=0)
    if found[0] is not None:
        raise FeaturesError(found[0])


def _mismatch(dataset: Any, vision_encoder: VisionEncoder, algorithms: Iterable[str]) -> str | None:
    where = ", ".join(stream.where for stream in dataset.streams)
    for name in algorithms:
        if getattr(named_classes("algorithms")[name], "changes_images", False):
            return f"algorithms.{name} changes images, and {where} holds features of them; leave out one of the two"
    if any(parameter.requires_grad for parameter in vision_encoder.parameters()):
        return f"model.trainable: vision_encoder can't learn from {where}, which holds its features; train on images"
    differing = dataset.features.differences(feature_set_of(vision_encoder, dataset.images))
    if not differing:
        return None
    fix = "encode the images again with composer-path encode and this run's YAML, or train on the images"
    return f"{where}: its features differ from what this run would make in {', '.join(differing)}; {fix}"
