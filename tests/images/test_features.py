"""Claims about stored features: bit for bit, known by their encoder, never mistaken for images."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from composer_path.images.features import (
    FeaturesError,
    FeatureSet,
    common_features,
    features_in_index,
    is_features,
    pack_features,
    unpack_features,
)

ENCODER = {"name": "timm/vit", "image_size": 32, "tokens": "all", "kwargs": {"depth": 2}}
SET = FeatureSet(ENCODER, "ab" * 8, fit="pad", decoder="pil", pad_color=[1, 2, 3], num_tokens=5, dim=6)


def index_of(features: FeatureSet | None) -> bytes:
    index: dict[str, Any] = {"shards": [], "version": 2}
    return json.dumps(index | ({} if features is None else {"features": features.to_json()})).encode()


def test_features_come_back_bit_for_bit() -> None:
    bits = torch.randint(-(2**15), 2**15, (5, 6), dtype=torch.int16)
    bits[0, :3] = torch.tensor([0x7FC0, 0x7F80, -0x8000], dtype=torch.int32).to(torch.int16)  # NaN, infinity, -0
    found = unpack_features(pack_features(bits.view(torch.bfloat16)), SET)
    assert torch.equal(found.view(torch.int16), bits)
    assert is_features(pack_features(bits.view(torch.bfloat16)))


def test_a_view_is_stored_as_it_looks() -> None:
    features = torch.randn(6, 5).bfloat16().T
    assert torch.equal(unpack_features(pack_features(features), SET), features)


def test_no_image_is_taken_for_features(repo_root: Path) -> None:
    images = sorted((repo_root / "test_data" / "imgs").iterdir())[:20]
    assert len(images) == 20
    assert not any(is_features(path.read_bytes()) for path in images)
    assert not is_features(b"")


@pytest.mark.parametrize("data", [b"", b"\xc5CPVF\r\n\x1a", b"no features at all, but long enough to be"])
def test_what_is_no_features_is_refused(data: bytes) -> None:
    with pytest.raises(FeaturesError, match=r"must be 5 tokens of 6, found .* bytes of another kind; encode the set"):
        unpack_features(data, SET)


@pytest.mark.parametrize("shape", [(5, 7), (6, 5), (1, 6)])
def test_features_of_another_shape_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(FeaturesError, match=f"of {shape[0]} x {shape[1]}; encode"):
        unpack_features(pack_features(torch.zeros(shape, dtype=torch.bfloat16)), SET)


def test_cut_features_are_refused() -> None:
    data = pack_features(torch.zeros(5, 6, dtype=torch.bfloat16))
    for wrong in (data[:-1], data + b"\0"):
        with pytest.raises(FeaturesError, match="5 x 6; encode the set again"):
            unpack_features(wrong, SET)


def test_an_index_says_what_its_features_are() -> None:
    assert features_in_index(index_of(None)) is None
    assert features_in_index(b'{"shards": [{"name": "\\"features\\""}], "version": 2}') is None
    assert features_in_index(index_of(SET)) == SET
    later = json.loads(index_of(SET))
    later["features"]["dtype"] = "float8"
    with pytest.raises(FeaturesError, match="a kind that this version doesn't know"):
        features_in_index(json.dumps(later).encode())


def test_all_sets_of_a_run_hold_features_of_one_encoder_or_none() -> None:
    other = dataclasses.replace(SET, weights="cd" * 8)
    assert common_features({"a": index_of(None), "b": index_of(None)}) is None
    assert common_features({"a": index_of(SET), "b": index_of(SET)}) == SET
    for sets in ({"a": SET, "b": None}, {"b": None, "a": SET}):
        with pytest.raises(FeaturesError, match="a holds features and b images; encode all sets of a run, or none"):
            common_features({where: index_of(one) for where, one in sets.items()})
    with pytest.raises(FeaturesError, match="a and b: features of different encoders: weights of the vision encoder"):
        common_features({"a": index_of(SET), "b": index_of(other)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": "0"}, ["weights of the vision encoder"]),
        ({"fit": "crop"}, ["fit (pad stored, crop here)"]),
        ({"decoder": "torchvision"}, ["decoder (pil stored, torchvision here)"]),
        ({"pad_color": (1, 2, 4)}, ["pad_color ([1, 2, 3] stored, [1, 2, 4] here)"]),
        ({"pad_color": (1, 2, 3)}, []),  # a tuple there, a list in JSON
        (
            {"encoder": ENCODER | {"image_size": 64}, "num_tokens": 17},
            ["image_size (32 stored, 64", "num_tokens (5 stored, 17"],
        ),
        ({"encoder": ENCODER | {"tokens": "patches"}}, ["tokens (all stored, patches here)"]),
    ],
)
def test_whatever_differs_is_named(change: dict[str, Any], words: list[str]) -> None:
    found = SET.differences(dataclasses.replace(SET, **change))
    assert len(found) == len(words)
    assert all(part in text for part, text in zip(words, found, strict=True))
