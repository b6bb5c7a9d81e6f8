"""Replicas of a sharded model (HSDP): 2 x 2 ranks on gloo equal one rank and full shard, and read their checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from config_problems import problems_of
from launched_ranks import launch
from tiny_run import (
    BARE,
    REPO_ROOT,
    TWO_STEPS,
    convert_shards,
    largest_error,
    load_tiny_config,
    road,
    run,
    two_steps,
    weights_of,
)
from torch.distributed.checkpoint import FileSystemReader

from composer_path.config.reading import load_config
from composer_path.run import sharding
from composer_path.run.sharding import build_parallelism_config, mesh_degrees

FSDP = "trainer.parallelism_config.fsdp"
REPLICAS = [f"{FSDP}.data_parallel_replicate_degree=2"]
DDP = ["trainer.parallelism_config=null"]
KEPT = ["trainer.save_interval=2ba", "trainer.save_num_checkpoints_to_keep=-1", "eval_loader=null"]
# In the third step only two of eight samples have an image.
THREE_IN_ORDER = [*TWO_STEPS, "train_loader.dataset.shuffle=false", "trainer.max_duration=3ba"]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages on one rank."""
    return road(tmp_path_factory.getbasetemp() / "road")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_shards(tmp_path_factory.getbasetemp() / "road" / "shards")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hybrid")


@pytest.fixture(scope="module")
def projector(one_rank: Path) -> str:
    return f"model.projector.weights={one_rank}/pretrain/projector.safetensors"


@pytest.fixture(scope="module")
def four_ranks(projector: str, shards: Path, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All runs that need four processes, in one start of them."""
    go_on = [projector, *BARE, *REPLICAS, f"trainer.load_path={folder}/full/finetune/checkpoints/ep0-ba2"]
    runs = {
        "steps": ("finetune", [projector, *TWO_STEPS, *REPLICAS]),
        "full_steps": ("finetune", [projector, *TWO_STEPS]),
        "frozen": ("pretrain", [*TWO_STEPS, *REPLICAS]),
        "text": ("finetune", [projector, *THREE_IN_ORDER, *REPLICAS]),
        "hybrid": ("finetune", [projector, *KEPT, *REPLICAS]),
        "full": ("finetune", [projector, *KEPT]),
        "from_full": ("finetune", go_on),
    }
    legs = [{"name": name, "stage": stage, "overrides": words} for name, (stage, words) in runs.items()]
    launched = launch(4, "four_ranks.py", legs, shards, folder)
    assert launched.notes.keys() == runs.keys(), launched.output[-6000:]
    return launched.notes


def on_one_rank(shards: Path, root: Path, stage: str, overrides: list[str]) -> dict[str, Any]:
    trainer, witness = run(load_tiny_config(stage, shards, root, overrides))
    return witness.notes() | {"weights": weights_of(trainer)}


def norm(gradients: dict[str, torch.Tensor]) -> float:
    return torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm().item()


# --- four ranks ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_replica_is_sharded_over_its_own_ranks(four_ranks: dict[str, list[dict[str, Any]]]) -> None:
    for name in ("steps", "frozen", "hybrid", "from_full"):
        for note in four_ranks[name]:
            assert note["laid_out"] == {("(Replicate(), Shard(dim=0))", "[[0, 1], [2, 3]]")}
    assert four_ranks["full_steps"][0]["laid_out"] == {("(Shard(dim=0),)", "[0, 1, 2, 3]")}


@pytest.mark.slow
def test_losses_gradients_and_weights_equal_full_shards_and_one_ranks(
    four_ranks: dict[str, list[dict[str, Any]]], one_rank: Path
) -> None:
    hybrid, full, one = four_ranks["steps"][0], four_ranks["full_steps"][0], two_steps(one_rank)
    for other in (full, one):
        assert list(hybrid["losses"].values()) == pytest.approx(list(other["losses"].values()), rel=1e-6)  # 1e-7
        assert largest_error(hybrid["gradients"], other["gradients"]) < 1e-6  # measured 3e-7
        assert largest_error(hybrid["weights"], other["weights"]) < 1e-6  # measured 1e-7
        assert norm(hybrid["gradients"]) == pytest.approx(norm(other["gradients"]), rel=1e-6)  # 4e-8


@pytest.mark.slow
def test_every_rank_holds_the_same_weights_after_the_steps(four_ranks: dict[str, list[dict[str, Any]]]) -> None:
    first, *others = four_ranks["steps"]
    for other in others:
        assert largest_error(other["weights"], first["weights"]) == 0


@pytest.mark.slow
def test_a_frozen_model_in_replicas_trains_its_projector_as_on_one_rank(
    four_ranks: dict[str, list[dict[str, Any]]], shards: Path, tmp_path: Path
) -> None:
    expected, first = on_one_rank(shards, tmp_path, "pretrain", [*TWO_STEPS]), four_ranks["frozen"][0]
    assert list(first["losses"].values()) == pytest.approx(list(expected["losses"].values()), rel=1e-6)
    assert largest_error(first["gradients"], expected["gradients"]) < 1e-6
    assert largest_error(first["weights"], expected["weights"]) < 1e-6


@pytest.mark.slow
def test_a_whole_run_with_clipping_equals_one_rank(four_ranks: dict[str, list[dict[str, Any]]], one_rank: Path) -> None:
    expected = torch.load(one_rank / "finetune.pt")
    for name in ("hybrid", "full"):
        notes = four_ranks[name]
        assert list(notes[0]["losses"].values()) == pytest.approx(list(expected["losses"].values()), rel=1e-5)
        assert largest_error(notes[0]["weights"], expected["weights"]) < 1e-5
        for step, samples in expected["samples"].items():
            assert sorted(sample for note in notes for sample in note["samples"][step]) == samples


@pytest.mark.slow
def test_ranks_without_images_neither_hang_nor_change_the_result(
    four_ranks: dict[str, list[dict[str, Any]]], projector: str, shards: Path, tmp_path: Path
) -> None:
    last = [note["metrics"]["batch/images"][-1] for note in four_ranks["text"]]
    assert min(last) == 0 < max(last)
    expected, first = on_one_rank(shards, tmp_path, "finetune", [projector, *THREE_IN_ORDER]), four_ranks["text"][0]
    assert list(first["losses"].values()) == pytest.approx(list(expected["losses"].values()), rel=1e-6)
    assert largest_error(first["weights"], expected["weights"]) < 1e-5


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_of_replicas_holds_each_tensor_once(
    four_ranks: dict[str, list[dict[str, Any]]], folder: Path
) -> None:
    sizes = {}
    for name in ("hybrid", "full"):
        place = folder / name / "finetune" / "checkpoints" / "ep0-ba2"
        entries = FileSystemReader(place).read_metadata().storage_data
        pieces = [(index.fqn, index.offset) for index in entries]
        assert len(pieces) == len(set(pieces))
        sizes[name] = sum(path.stat().st_size for path in place.glob("*.distcp"))
    assert sizes["hybrid"] < 1.1 * sizes["full"]  # not twice


@pytest.mark.slow
def test_full_shards_checkpoint_goes_on_in_replicas(
    four_ranks: dict[str, list[dict[str, Any]]], one_rank: Path
) -> None:
    expected, resumed = torch.load(one_rank / "finetune.pt"), four_ranks["from_full"][0]
    assert list(resumed["losses"]) == [2, 3, 4, 5]
    assert list(resumed["losses"].values()) == pytest.approx(list(expected["losses"].values())[2:], rel=1e-5)
    assert largest_error(resumed["weights"], expected["weights"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_checkpoint_of_replicas_goes_on_on_one_rank(
    four_ranks: dict[str, list[dict[str, Any]]],
    one_rank: Path,
    projector: str,
    shards: Path,
    folder: Path,
    tmp_path: Path,
    kind: str,
) -> None:
    checkpoint = folder / "hybrid" / "finetune" / "checkpoints" / "ep0-ba2"
    more = [projector, *BARE, f"trainer.load_path={checkpoint}", *(DDP if kind == "ddp" else [])]
    resumed, expected = on_one_rank(shards, tmp_path, "finetune", more), torch.load(one_rank / "finetune.pt")
    assert list(resumed["losses"]) == [2, 3, 4, 5]
    assert list(resumed["losses"].values()) == pytest.approx(list(expected["losses"].values())[2:], rel=1e-5)
    assert largest_error(resumed["weights"], expected["weights"]) < 1e-5


@pytest.mark.slow
@pytest.mark.slow
def test_a_checkpoint_of_replicas_goes_on_in_full_shard_on_two_ranks(
    four_ranks: dict[str, list[dict[str, Any]]], one_rank: Path, projector: str, shards: Path, folder: Path
) -> None:
    checkpoint = folder / "hybrid" / "finetune" / "checkpoints" / "ep0-ba2"
    words = [projector, *BARE, f"trainer.load_path={checkpoint}"]
    launched = launch(2, "four_ranks.py", [{"name": "two", "stage": "finetune", "overrides": words}], shards, folder)
    assert launched.notes, launched.output[-6000:]
    expected, resumed = torch.load(one_rank / "finetune.pt"), launched.notes["two"][0]
    assert list(resumed["losses"].values()) == pytest.approx(list(expected["losses"].values())[2:], rel=1e-5)
    assert largest_error(resumed["weights"], expected["weights"]) < 1e-5


# --- degrees ---------------------------------------------------------------------------------------------------------


def degrees(replicas: int | None = None, shards: int = -1) -> dict[str, Any]:
    return {"data_parallel_replicate_degree": replicas, "data_parallel_shard_degree": shards}


def test_what_is_left_out_follows_from_the_ranks() -> None:
    assert mesh_degrees(degrees(), 8) == (1, 8)
    assert mesh_degrees(degrees(2), 8) == (2, 4)
    assert mesh_degrees(degrees(2, 4), 8) == (2, 4)
    assert mesh_degrees(degrees(None, 8), 8) == (1, 8)


# Replicas, shards, ranks, and what is said.
MISFITS: list[tuple[int | None, int, int, str]] = [
    (3, -1, 8, "data_parallel_replicate_degree: found 3, but 8 ranks can't be divided into so many replicas; take 1, "),
    (16, -1, 8, "take 1, 2, 4 or 8"),
    (2, 8, 8, "data_parallel_shard_degree: 2 replicas of 8 ranks each are 16, found 8 in this run; leave it out"),
    (None, 4, 8, "data_parallel_shard_degree: 1 replica of 4 ranks each are 4, found 8 in this run"),
]


@pytest.mark.parametrize(("replicas", "shards", "ranks", "message"), MISFITS)
def test_degrees_that_do_not_fit_the_ranks_are_refused_by_name_at_the_check(
    replicas: int | None, shards: int, ranks: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = REPO_ROOT / "yamls" / "demo" / "finetune.yaml"
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    words = [f"{FSDP}.{key}={json.dumps(value)}" for key, value in degrees(replicas, shards).items()]
    (problem,) = problems_of(demo, *words)
    assert problem.startswith("trainer.parallelism_config.fsdp.data_parallel_") and message in problem


def test_one_process_may_read_the_yaml_of_many_ranks_but_not_train_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")  # as a training before in this process leaves it
    demo = REPO_ROOT / "yamls" / "demo" / "finetune.yaml"
    load_config(demo, [f"{FSDP}.data_parallel_replicate_degree=2"])
    with pytest.raises(ValueError, match="found 2, but 1 rank can't be divided into so many replicas; take 1"):
        build_parallelism_config({"fsdp": degrees(2)})


@pytest.mark.parametrize("value", ["0", "-1", "two", "2.0"])
def test_a_number_of_replicas_is_a_number(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    demo = REPO_ROOT / "yamls" / "demo" / "finetune.yaml"
    problems = problems_of(demo, f"{FSDP}.data_parallel_replicate_degree={value}")
    assert "data_parallel_replicate_degree: found " in problems[0]
    assert "data_parallel_shard_degree: found 0" in problems_of(demo, f"{FSDP}.data_parallel_shard_degree=0")[0]


def test_degrees_that_do_not_fit_are_refused_at_a_start_before_the_model_is_built(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("composer_path.train.build_model", None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = load_tiny_config("finetune", shards, tmp_path, REPLICAS)
    with pytest.raises(ValueError, match="data_parallel_replicate_degree: found 2, but 1 rank can't be divided"):
        run(config)


def test_one_replica_is_full_shard_and_torch_2_7_on_a_cpu_refuses_two(monkeypatch: pytest.MonkeyPatch) -> None:
    rest = {"version": 2, "reshard_after_forward": True, "mixed_precision": "DEFAULT", "verbose": False}
    monkeypatch.setattr(sharding.dist, "get_world_size", lambda: 4)
    built = build_parallelism_config({"fsdp": rest | degrees(1, 4)})
    assert built is not None and built["fsdp"].data_parallel_replicate_degree is None
    monkeypatch.setattr(sharding, "_events_missing", lambda: True)
    with pytest.raises(ValueError, match=r"replicate_degree: found 2, which torch .* can't on a CPU; leave it out"):
        build_parallelism_config({"fsdp": rest | degrees(2)})
