"""A run's fingerprint tells every difference, and which of them a run can go on with."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from tiny_run import load_tiny_config

from composer_path.config.reading import plain
from composer_path.run.fingerprint import differences, fingerprint, hash_of_files, weights_files


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return plain(load_tiny_config("finetune", Path("shards"), Path("runs")))


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict) and value:
        for key, member in value.items():
            yield from leaves(member, (*path, key))
    else:
        yield path


def changed(settings: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    other = deepcopy(settings)
    section: Any = other
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = "something else" if section[path[-1]] != "something else" else 7
    return other


# What a run must have as it began, by the beginnings of the names; the rest can change at a resume.
FIXED = (
    *(
        "seed",
        "tokenizer.",
        "model.",
        "optimizer.name",
        "optimizer.fused",
        "optimizer.amsgrad",
        "optimizer.groups",
        "optimizer.layer_wise_lr_decay",
    ),
    *(f"train_loader.dataset.{key}" for key in ("template", "max_seq_len", "image_position", "fit", "max_pixels")),
    *(f"train_loader.dataset.{key}" for key in ("scale_levels", "decoder", "streams")),
    "execution.frozen_weights",
)
FREE = (
    *("model.attention", "tokenizer.path", "model.vision_encoder.weights", "model.projector.weights"),
    "model.projector.pooler_weights",
    "model.language_model.path",
)


def test_every_setting_that_changes_is_applied_or_refused_by_its_name(settings: dict[str, Any]) -> None:
    before, paths = fingerprint(settings, {}), list(leaves(settings))
    assert len(paths) > 100
    for path in paths:
        name = ".".join(path)
        applied, refused = differences(before, fingerprint(changed(settings, path), {}))
        lines = applied + refused
        assert lines and all(line.startswith(name) for line in lines), (name, lines)
        assert bool(refused) == (name.startswith(FIXED) and not name.startswith(FREE)), (name, lines)


def test_without_a_change_there_is_no_difference(settings: dict[str, Any]) -> None:
    assert differences(fingerprint(settings, {"a": "1"}), fingerprint(deepcopy(settings), {"a": "1"})) == ([], [])


def test_a_key_that_is_new_or_gone_is_a_difference(settings: dict[str, Any]) -> None:
    other = deepcopy(settings)
    other["algorithms"]["ema"] = {"half_life": "10ba"}
    del other["callbacks"]["lr_monitor"]
    applied, refused = differences(fingerprint(settings, {}), fingerprint(other, {}))
    assert "algorithms.ema.half_life: nothing before, now '10ba'" in applied and refused == []
    assert any(line.startswith("callbacks.lr_monitor") for line in applied)


def test_rates_by_module_are_other_groups_of_the_optimizer(settings: dict[str, Any]) -> None:
    other = deepcopy(settings)
    other["optimizer"]["lr"] = {"projector": 1e-3, "language_model": 1e-4}
    before = fingerprint(settings, {})
    applied, refused = differences(before, fingerprint(other, {}))
    assert refused == [] and len(applied) >= 2  # the groups are the modules' anyway


def test_what_files_hold_is_compared_not_where_they_lie(settings: dict[str, Any], tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "vision.safetensors").write_bytes(b"weights")
    hashes = [hash_of_files([tmp_path / folder / "vision.safetensors"]) for folder in ("a", "b")]
    assert hashes[0] == hashes[1]
    moved = deepcopy(settings)
    moved["model"]["vision_encoder"]["weights"] = str(tmp_path / "b" / "vision.safetensors")
    before, now = (
        fingerprint(settings, {"vision_encoder": hashes[0]}),
        fingerprint(moved, {"vision_encoder": hashes[1]}),
    )
    assert differences(before, now) == (["model.vision_encoder.weights: another place"], [])
    (tmp_path / "b" / "vision.safetensors").write_bytes(b"others")
    now = fingerprint(moved, {"vision_encoder": hash_of_files([tmp_path / "b" / "vision.safetensors"])})
    _, [line] = differences(before, now)
    assert line.startswith("what vision_encoder holds: this run began with")


def test_weights_of_frozen_modules_are_hashed_and_those_of_trained_ones_are_not(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    model = deepcopy(settings)
    (tmp_path / "llm").mkdir()
    for name in ("model-1.safetensors", "model-2.safetensors", "config.json"):
        (tmp_path / "llm" / name).touch()
    model["model"]["language_model"]["path"] = str(tmp_path / "llm")
    model["model"]["vision_encoder"]["weights"] = "vision.pt"
    model["model"]["trainable"] = ["projector"]
    found = weights_files(model)
    assert {name: [path.name for path in paths] for name, paths in found.items()} == {
        "language_model": ["model-1.safetensors", "model-2.safetensors"],
        "vision_encoder": ["vision.pt"],
    }
    model["model"]["trainable"] = ["projector", "language_model"]
    assert set(weights_files(model)) == {"vision_encoder"}


def test_a_fingerprint_holds_no_value_of_what_may_be_secret(settings: dict[str, Any]) -> None:
    other = deepcopy(settings)
    other["train_loader"]["dataset"]["remote"] = "s3://key:s3cr3t@host/bucket"
    other["variables"]["token"] = "s3cr3t"
    other["loggers"]["wandb"] = {"init_kwargs": {"api_key": "s3cr3t"}}
    assert "s3cr3t" not in repr(fingerprint(other, {}))
