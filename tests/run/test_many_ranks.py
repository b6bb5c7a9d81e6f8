"""What each of 8, 64 and 512 ranks holds of the 13B YAMLs, counted without weights and without other processes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from tiny_run import REPO_ROOT
from warm_process import popen

LLAMA_2_13B = (
    "{model_type: llama, hidden_size: 5120, intermediate_size: 13824, num_hidden_layers: 40, num_attention_heads: 40, "
    "num_key_value_heads: 40, vocab_size: 32000, max_position_embeddings: 4096}"
)
WITHOUT_WEIGHTS = [
    "model.language_model.path=null",
    f"model.language_model.config={LLAMA_2_13B}",
    "model.projector.weights=null",
    "model.vision_encoder.weights=null",
    "train_loader.global_batch_size=512",
    "eval_loader.global_batch_size=512",
]
LANGUAGE_MODEL = 13_015_864_320
TRAINED = {"pretrain": ["projector"], "finetune": ["projector", "language_model"]}
# Stage, ranks, replicas, and the rank that is looked at: the first, the last, or one in between.
CASES = [
    *(("pretrain", *case) for case in [(8, 1, 7), (64, 8, 37), (512, 1, 511)]),
    *(("finetune", *case) for case in [(8, 1, 0), (64, 1, 63), (64, 8, 37), (512, 64, 511), (512, 1, 511)]),
]


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, int, int], dict[str, Any]]:
    """What the ranks of the cases hold, for both YAMLs."""
    folder = tmp_path_factory.mktemp("many_ranks")
    asked = {
        (stage, ranks, replicas, rank): [
            str(REPO_ROOT / "yamls" / f"{stage}.yaml"),
            [*WITHOUT_WEIGHTS, f"trainer.parallelism_config.fsdp.data_parallel_replicate_degree={replicas}"],
            ranks,
            rank,
        ]
        for stage, ranks, replicas, rank in CASES
    }
    (folder / "cases.json").write_text(json.dumps(list(asked.values())), encoding="utf-8")
    script = str(REPO_ROOT / "tests" / "fake_ranks.py")
    command = [sys.executable, script, str(folder / "cases.json"), str(folder / "out.json")]
    process = popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    found = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    return dict(zip(asked, found, strict=True))


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request: pytest.FixtureRequest, held: dict[Any, dict[str, Any]]) -> tuple[str, int, int, int, dict[str, Any]]:
    return (*request.param, held[request.param])


Case = tuple[str, int, int, int, dict[str, Any]]


def test_each_replica_is_sharded_over_neighbouring_ranks(case: Case) -> None:
    _, ranks, replicas, rank, found = case
    shards = ranks // replicas
    first = rank // shards * shards
    assert found["mesh"] == ([shards] if replicas == 1 else [replicas, shards])
    assert found["row"] == list(range(first, first + shards))
    assert found["placements"] == ["(Shard(dim=0),)" if replicas == 1 else "(Replicate(), Shard(dim=0))"]


def test_units_are_blocks_encoder_projector_and_root_and_hold_every_parameter_once(case: Case) -> None:
    found = case[-1]
    units = {name: unit["parameters"] for name, unit in found["units"].items()}
    blocks = [name for name in units if name.startswith("model.language_model.") and ".layers." in name]
    images = [name for name in units if name.startswith("model.vision_encoder.") and ".blocks." in name]
    assert len(blocks) == 40 and len(images) == 24
    assert set(units) == {"model", "model.vision_encoder", "model.projector", *blocks, *images}
    assert {units[name] for name in blocks} == {317_204_480}
    assert units["model"] == 2 * 32_000 * 5_120 + 5_120
    whole = sum(size for size, *_ in found["parameters"].values())
    assert sum(units.values()) == whole
    in_language_model = [size for name, (size, *_) in found["parameters"].items() if name.startswith("language_model.")]
    assert sum(in_language_model) == LANGUAGE_MODEL


def test_ranks_of_a_replica_hold_every_parameter_once_together(case: Case) -> None:
    """A parameter is cut along its first axis into pieces of equal size; the last ones may be shorter, or nothing."""
    _, ranks, replicas, rank, found = case
    shards = ranks // replicas
    for name, (size, _, mine, _, rows) in found["parameters"].items():
        piece = -(-rows // shards)
        cuts = [min(rows, (at + 1) * piece) - min(rows, at * piece) for at in range(shards)]
        assert sum(cuts) == rows
        assert mine == cuts[rank % shards] * (size // rows), name


def test_a_rank_holds_its_share_of_the_weights(case: Case) -> None:
    """Within 2 %, which is what tensors of few rows cost: 32,000 rows over 512 ranks are 63 each."""
    _, ranks, replicas, _, found = case
    mine = sum(own for _, _, own, *_ in found["parameters"].values())
    whole = sum(size for size, *_ in found["parameters"].values())
    assert mine == pytest.approx(whole / (ranks // replicas), rel=0.02 if ranks // replicas <= 64 else 0.05)


def test_what_is_trained_is_fp32_and_what_is_frozen_bf16_and_all_compute_in_bf16(case: Case) -> None:
    stage, *_, found = case
    for name, (_, dtype, _, learns, _) in found["parameters"].items():
        assert learns == (name.split(".")[0] in TRAINED[stage]), name
        assert dtype == ("torch.float32" if learns else "torch.bfloat16"), name
    for name, unit in found["units"].items():
        assert len(unit["dtypes"]) == 1, name
        assert unit["computes_in"] == ["torch.bfloat16"] and unit["reduces_in"] == ["torch.float32"], name
