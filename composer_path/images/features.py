"""Vision features in place of images: what `composer-path encode` stores, so that training skips the vision encoder.

A set of features says so in its index.json, under `features`, which every reader has at hand before the first shard. In
the column of images each image is then a header of 16 bytes and its features, bf16, one token after the other.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from jaxtyping import BFloat16
from torch import Tensor

INDEX_KEY = "features"
# No image format begins so; the first byte is no text.
_MAGIC = b"\xc5CPVF\r\n\x1a"
_HEADER = struct.Struct("<8sII")  # magic, tokens, dim


class FeaturesError(ValueError):
    """Stored features of another encoder or of other images than a run asks for: every sample is wrong, so it ends."""


@dataclass(frozen=True)
class FeatureSet:
    """How the features of a set were made; what must be the same for the model that is trained on them.

    `encoder` are keywords that rebuild the vision encoder, `weights` the hash of its weights; `fit`, `decoder` and
    `pad_color` are those of `ImagePreparation`; an image has `num_tokens` tokens of width `dim`.
    """

    encoder: Mapping[str, Any]
    weights: str
    fit: str
    decoder: str
    pad_color: Sequence[int]
    num_tokens: int
    dim: int

    def to_json(self) -> dict[str, Any]:
        """What stands in index.json and dataset.json."""
        return asdict(self) | {"dtype": "bfloat16"}

    def differences(self, other: FeatureSet) -> list[str]:
        """What another one says otherwise."""
        ours, theirs = (json.loads(json.dumps(one.to_json())) for one in (self, other))
        weights = ["weights of the vision encoder"] if ours.pop("weights") != theirs.pop("weights") else []
        ours, theirs = (one.pop("encoder") | one for one in (ours, theirs))
        changed = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
        return [f"{key} ({ours.get(key)} stored, {theirs.get(key)} here)" for key in changed] + weights


def features_in_index(index: bytes) -> FeatureSet | None:
    """What a set's index says of its features; None for a set of images."""
    if b'"features"' not in index:  # spares the reading of a long one
        return None
    found = json.loads(index).get(INDEX_KEY)
    if found is None:
        return None
    names = [field.name for field in fields(FeatureSet)]
    if found.get("dtype") != "bfloat16" or not set(names) <= set(found):
        raise FeaturesError("index.json: found features of a kind that this version doesn't know; encode the set again")
    return FeatureSet(**{name: found[name] for name in names})


def common_features(indices: Mapping[str, bytes]) -> FeatureSet | None:
    """What all sets of a run say of their features, from the index.json of each place.

    Raises:
        FeaturesError: Some hold features and others images, or those of another encoder.
    """
    found = {where: features_in_index(index) for where, index in indices.items()}
    (where, first), *others = found.items()
    for other, features in others:
        if (features is None) != (first is None):
            held, images = (where, other) if features is None else (other, where)
            raise FeaturesError(f"{held} holds features and {images} images; encode all sets of a run, or none")
        if features is not None and first is not None and (differing := first.differences(features)):
            raise FeaturesError(f"{where} and {other}: features of different encoders: {', '.join(differing)}")
    return first


def pack_features(features: BFloat16[Tensor, "tokens dim"]) -> bytes:
    """An image's features as they are stored."""
    tokens, dim = features.shape
    values = features.contiguous().view(torch.int16).numpy()
    return _HEADER.pack(_MAGIC, tokens, dim) + values.astype("<i2", copy=False).tobytes()


def is_features(data: bytes | memoryview) -> bool:
    """Whether a stored image is features."""
    return data[: len(_MAGIC)] == _MAGIC


def unpack_features(data: bytes | memoryview, expected: FeatureSet) -> BFloat16[Tensor, "tokens dim"]:
    """What `pack_features` stored; refused where it is damaged, or of another shape than the index says."""
    shape = _HEADER.unpack_from(data)[1:] if is_features(data) and len(data) >= _HEADER.size else None
    if shape != (expected.num_tokens, expected.dim) or len(data) != _HEADER.size + 2 * shape[0] * shape[1]:
        raise FeaturesError(
            f"stored features must be {expected.num_tokens} tokens of {expected.dim}, found {len(data)} bytes of "
            f"{'another kind' if shape is None else f'{shape[0]} x {shape[1]}'}; encode the set again"
        )
    return torch.frombuffer(bytearray(data), dtype=torch.bfloat16, offset=_HEADER.size).view(*shape)
