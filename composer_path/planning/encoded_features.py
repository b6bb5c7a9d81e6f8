"""Runs a set's images through the vision encoder once and stores its features; checks them before training.

Worth it where every image is used at least twice, see docs/batches.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import BFloat16, UInt8
from torch import Tensor

from composer_path.conversion.destination import CARD_NAME, INDEX_NAME, MANIFEST_NAME
from composer_path.images.features import (
    INDEX_KEY,
    FeaturesError,
    FeatureSet,
    features_in_index,
    is_features,
    pack_features,
)
from composer_path.images.pixels import ImageError, load_stored_image, normalize_image, pad_color_of
from composer_path.models.vision_encoder import VisionEncoder
from composer_path.run.names import named_classes
from composer_path.shards.columns import COLUMNS, pack_images, unpack_images
from composer_path.shards.view import ShardView, ShardViewError
from composer_path.shards.writer import ShardWriter
from composer_path.storage.places import open_place

_PART, _SIZE_LIMIT = "part-00000", 2**28  # 160 images of the reference's encoder in a shard
_KEPT = ("format", "format_version", "composer_path", "source", "columns")


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


class FeatureEncoder:
    """A vision encoder as training runs it, with how training prepares images for it.

    Args:
        vision_encoder: Frozen, in the dtype and on the device that it runs in.
        fit: See `load_image`.
        decoder: See `load_image`.
        max_pixels: Larger images can't be decoded; None for the default of `load_image`.
        precision: Composer's name of the precision that training runs in.
    """

    def __init__(
        self,
        vision_encoder: VisionEncoder,
        fit: str = "pad",
        decoder: str = "pil",
        max_pixels: int | None = None,
        precision: str = "fp32",
    ) -> None:
        self.vision_encoder = vision_encoder
        self.precision = precision
        self.pad_color = pad_color_of(vision_encoder.mean)
        self.keywords: dict[str, Any] = {"fit": fit, "decoder": decoder, "pad_color": self.pad_color}
        self.keywords |= {"image_size": vision_encoder.image_size}
        self.keywords |= {} if max_pixels is None else {"max_pixels": max_pixels}

    @property
    def feature_set(self) -> FeatureSet:
        """What its features are known by."""
        size = self.vision_encoder.image_size
        return FeatureSet(
            encoder=self.vision_encoder.config,
            weights=weights_hash(self.vision_encoder),
            fit=self.keywords["fit"],
            decoder=self.keywords["decoder"],
            pad_color=list(self.pad_color),
            num_tokens=self.vision_encoder.num_tokens(size, size),
            dim=self.vision_encoder.dim,
        )

    def decode(self, image: bytes) -> UInt8[Tensor, "3 height width"] | None:
        """An image's pixels, as training sees them; None where they can't be had."""
        try:
            return load_stored_image(image, **self.keywords)
        except ImageError:
            return None

    @torch.no_grad()
    def encode(self, pixels: UInt8[Tensor, "images 3 height width"]) -> BFloat16[Tensor, "images tokens dim"]:
        """Features of a batch of images, on the CPU."""
        from composer.core.precision import get_precision_context

        encoder = self.vision_encoder
        device = next(encoder.parameters()).device
        images = normalize_image(pixels.to(device), mean=encoder.mean, std=encoder.std)
        with get_precision_context(self.precision) if device.type == "cuda" else contextlib.nullcontext():
            return encoder(images).to(torch.bfloat16).cpu()


def build_feature_encoder(settings: Mapping[str, Any], device: str | None = None) -> FeatureEncoder:
    """The vision encoder of a configuration, with the same weights as in training.

    Args:
        settings: The configuration as plain mappings.
        device: `cuda` or `cpu`; None for a GPU where there is one.

    Raises:
        ValueError: The YAML trains the encoder, so its features would change.
    """
    from composer_path.models.language_model import cast_parameters
    from composer_path.models.vision_encoder import build_vision_encoder
    from composer_path.run.sharding import compute_dtype, settle_precision

    if "vision_encoder" in settings["model"]["trainable"]:
        raise ValueError("model.trainable: vision_encoder learns in this run, so its features can't be stored")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    trainer = dict(settings["trainer"])
    settle_precision(trainer, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings["seed"])  # random weights are those that `assemble_model` draws
        encoder = build_vision_encoder(**settings["model"]["vision_encoder"])
    cast_parameters(encoder, compute_dtype(trainer.get("precision"), trainer.get("parallelism_config")))
    encoder.requires_grad_(False).to(device)
    dataset = settings["train_loader"]["dataset"]
    keywords = {key: dataset[key] for key in ("fit", "decoder", "max_pixels") if dataset.get(key) is not None}
    return FeatureEncoder(encoder, **keywords, precision=str(trainer.get("precision") or "fp32"))


def weights_hash(vision_encoder: VisionEncoder) -> str:
    """A hash of an encoder's weights, as they are in bf16: in which dtype they are held doesn't matter."""
    state = hashlib.sha256()
    parameters = {
        name.replace("_checkpoint_wrapped_module.", ""): one for name, one in vision_encoder.named_parameters()
    }
    for name, parameter in sorted(parameters.items()):
        values = parameter.detach().to(device="cpu", dtype=torch.bfloat16).contiguous()
        state.update(f"{name} {list(values.shape)}".encode())
        state.update(values.view(torch.int16).numpy().tobytes())
    return state.hexdigest()[:16]


def encode_set(
    view: ShardView,
    out: str,
    encoder: FeatureEncoder,
    batch_size: int = 32,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> EncodedSummary:
    """Write a set with features in place of its images; all else is copied bit for bit, in the same order.

    The new set has an index only when all of it is verified; a run that ends early leaves nothing.

    Args:
        view: The set to encode.
        out: Folder or address for the new one; nothing may lie there.
        encoder: Of the training that will read it.
        batch_size: Images that are encoded together.
        workers: Threads that decode images.
        progress: Called with the number of samples that are done.

    Raises:
        ShardViewError: The set can't be read or holds features already, or something lies at `out`.
        StorageError: The new set can't be written.
    """
    if features_in_index(view.place.read(INDEX_NAME)) is not None:
        raise ShardViewError(f"{view.place}: holds features already; encode the set of images that they were made of")
    place = open_place(out)
    if place.files():
        raise ShardViewError(f"{place}: must be empty, found files; choose another place")
    writer, summary = ShardWriter(place, _PART, COLUMNS, _SIZE_LIMIT, ["xxh64"]), EncodedSummary()
    try:
        place.write(MANIFEST_NAME, [b"{}\n"])  # says to who looks in that this set isn't finished
        for columns, stored in _encoded(view, encoder, batch_size, workers):
            writer.write(columns | {"images": pack_images(stored)})
            summary.samples += 1
            if progress is not None:
                progress(summary.samples)
            summary.images += len(stored)
            summary.undecodable += sum(not is_features(image) for image in stored)
            summary.bytes += sum(map(len, stored))
        writer.finish()
        features = encoder.feature_set.to_json()
        card = _card(view, summary, writer.shards, features)
        place.sync(f"{_PART}/{file['name']}" for file in writer.files)
        place.write(CARD_NAME, [(json.dumps(card, indent=2) + "\n").encode()], durable=True)
        index = {"shards": writer.shards, "version": 2, INDEX_KEY: features}
        place.write(INDEX_NAME, [json.dumps(index, sort_keys=True).encode()], durable=True)
        place.delete([MANIFEST_NAME])
    except BaseException:
        ours = (INDEX_NAME, CARD_NAME, MANIFEST_NAME, f"{_PART}/")
        place.delete([name for name in place.files() if name.startswith(ours)])
        raise
    finally:
        writer.close()
    return summary


Decoded = list[UInt8[Tensor, "3 height width"] | None]
Group = list[tuple[dict[str, Any], list[bytes]]]  # columns of samples, and their images


def _encoded(
    view: ShardView, encoder: FeatureEncoder, batch_size: int, workers: int
) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
    """Samples with what is stored of their images: features, or the file itself where it can't be decoded."""
    with ThreadPoolExecutor(workers) as pool:
        # While one group is encoded, the next one is read and decoded.
        waiting: tuple[Group, list[Future]] | None = None
        for group in _and_none(_groups(view, batch_size)):
            begun = None if group is None else (group, [pool.submit(encoder.decode, image) for image in _images(group)])
            if waiting is not None:
                yield from _finish(waiting[0], [future.result() for future in waiting[1]], encoder, batch_size)
            waiting = begun


def _finish(
    group: Group, decoded: Decoded, encoder: FeatureEncoder, batch_size: int
) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
    good = [pixels for pixels in decoded if pixels is not None]
    features = (
        pack_features(of_image)
        for at in range(0, len(good), batch_size)
        for of_image in encoder.encode(torch.stack(good[at : at + batch_size]))
    )
    results = iter(decoded)
    for columns, images in group:
        yield columns, [image if next(results) is None else next(features) for image in images]


def _groups(view: ShardView, num_images: int) -> Iterator[Group]:
    """Samples in order, as many as have so many images together."""
    group: Group = []
    for number in range(len(view.shards)):
        for _, columns in view.records(number):
            group.append((columns, unpack_images(columns["images"])))
            if len(_images(group)) >= num_images or len(group) >= 8 * num_images:
                yield group
                group = []
    if group:
        yield group


def _and_none(groups: Iterator[Group]) -> Iterator[Group | None]:
    yield from groups
    yield None


def _images(group: Group) -> list[bytes]:
    return [image for _, images in group for image in images]


def _card(
    view: ShardView, summary: EncodedSummary, shards: list[dict[str, Any]], features: dict[str, Any]
) -> dict[str, Any]:
    """The new set's data card: what still holds of the old one's, and how the features were made."""
    return {
        **{key: view.card[key] for key in _KEPT if key in view.card},
        "records": summary.samples,
        "images": summary.images,
        "undecodable": summary.undecodable,
        INDEX_KEY: features,
        "shards": len(shards),
        "bytes": sum(shard["raw_data"]["bytes"] for shard in shards),
        "partitions": 1,
    }


def check_features(dataset: Any, vision_encoder: VisionEncoder, algorithms: Iterable[str]) -> None:
    """Whether a loader's stored features are those that this run's encoder would make; nothing is asked of images.

    Args:
        dataset: A `ConversationDataset`.
        vision_encoder: As it was built: only rank 0 needs its weights.
        algorithms: Their names in the YAML.

    Raises:
        FeaturesError: Another encoder, other image settings, an encoder that learns, or an algorithm that changes
            images; on all ranks.
    """
    from composer.utils import dist

    stored: FeatureSet | None = dataset.features
    if stored is None:
        return
    where = ", ".join(stream.where for stream in dataset.streams)
    found: list[str | None] = [None]
    if dist.get_global_rank() == 0:
        found[0] = _mismatch(stored, where, dataset.image_keywords, vision_encoder, algorithms)
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(found, src=0)
    if found[0] is not None:
        raise FeaturesError(found[0])


def _mismatch(
    stored: FeatureSet,
    where: str,
    image_keywords: Mapping[str, Any],
    vision_encoder: VisionEncoder,
    algorithms: Iterable[str],
) -> str | None:
    for name in algorithms:
        if getattr(named_classes("algorithms")[name], "changes_images", False):
            return f"algorithms.{name} changes images, and {where} holds features of them; leave out one of the two"
    if any(parameter.requires_grad for parameter in vision_encoder.parameters()):
        return f"model.trainable: vision_encoder can't learn from {where}, which holds its features; train on images"
    keywords = {key: image_keywords[key] for key in ("fit", "decoder")}
    differing = stored.differences(FeatureEncoder(vision_encoder, **keywords).feature_set)
    if not differing:
        return None
    fix = "encode the images again with data_prep/encode.py and this run's YAML, or train on the images"
    return f"{where}: its features differ from what this run would make in {', '.join(differing)}; {fix}"
