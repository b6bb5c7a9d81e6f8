"""A run's memory and time, before it starts."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from composer_path.cli import main
from composer_path.config.reading import load_config, plain
from composer_path.models.execution import Checkpointing
from composer_path.models.path_mllm import PathMLLM
from composer_path.planning import plan as planning
from composer_path.planning.gpu_share import standing_bytes, traffic_of_step
from composer_path.planning.plan import (
    PEAK_FLOPS,
    Machine,
    Plan,
    SampleSize,
    _empty_model,
    make_plan,
    parse_memory,
)
from composer_path.planning.step_memory import RowSize, computing_in, peak_of_step

MEDIUM = (
    "{model_type: llama, hidden_size: 512, intermediate_size: 1376, num_hidden_layers: 4, num_attention_heads: 8, "
    "num_key_value_heads: 8, vocab_size: 4000}"
)
SAMPLE = SampleSize(tokens=300, answers=100, images=1)


def overrides(*more: str) -> list[str]:
    return [
        "model.language_model.path=null",
        f"model.language_model.config={MEDIUM}",
        "model.vision_encoder.image_size=224",
        "model.vision_encoder.kwargs={embed_dim: 192, depth: 2, num_heads: 3}",
        "model.projector.type=null",
        "model.projector.pooler={dim: 128}",
        "model.vision_encoder.weights=null",
        "train_loader.dataset.max_seq_len=2048",
        *more,
    ]


@functools.cache
def model_of(settings: str, checkpointing: str) -> PathMLLM:
    return _empty_model(json.loads(settings), checkpointing)


@pytest.fixture(scope="module", autouse=True)
def steps_run_once() -> Iterator[None]:
    """Plans whose models are the same share them and what their steps take."""

    def shared(settings: dict[str, Any], checkpointing: str) -> PathMLLM:
        return model_of(json.dumps({key: settings[key] for key in ("model", "execution")}), checkpointing)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_empty_model", shared)
        patch.setattr(planning, "bytes_of_rows", functools.cache(planning.bytes_of_rows))
        yield


@functools.cache
def planned(repo_root: Path, stage: str, gpus: int, memory: float, *more: str) -> Plan:
    config = load_config(repo_root / "yamls" / f"{stage}.yaml", overrides(*more))
    return make_plan(config, Machine(gpus, memory, PEAK_FLOPS["H100"]), SAMPLE)


@pytest.fixture(scope="module")
def finetune(repo_root: Path) -> Plan:
    return planned(repo_root, "finetune", 8, 8e9)


def test_the_largest_microbatch_just_fits(finetune: Plan, repo_root: Path) -> None:
    settings = plain(load_config(repo_root / "yamls" / "finetune.yaml", overrides()))
    free = finetune.machine.memory * 0.92 - finetune.standing.total
    for fit in finetune.fits:
        samples = fit.most_tokens // SAMPLE.tokens
        assert samples > 10
        with computing_in(planning._empty_model(settings, fit.checkpointing), torch.bfloat16) as model:
            inside, beyond = (
                peak_of_step(model, RowSize(samples + more, SAMPLE.tokens, SAMPLE.answers, 1)) for more in (0, 2)
            )
        assert inside <= free * 1.001 < beyond * 1.005


def test_less_kept_means_larger_microbatches_and_only_full_computes_twice(finetune: Plan) -> None:
    assert [fit.checkpointing for fit in finetune.fits] == list(get_args(Checkpointing))
    off, selective, full = finetune.fits
    assert off.most_tokens < selective.most_tokens < full.most_tokens
    assert off.recomputed == selective.recomputed == 0 and 0.2 < full.recomputed < 0.34


def test_standing_memory_is_16_bytes_a_trained_weight_and_2_a_frozen_one_over_all_gpus(repo_root: Path) -> None:
    first, second = (planned(repo_root, stage, 8, 8e9) for stage in ("pretrain", "finetune"))
    for plan in (first, second):
        trained = sum(count for count, learns in plan.parameters.values() if learns)
        frozen = sum(count for count, learns in plan.parameters.values() if not learns)
        spread = plan.standing.weights + plan.standing.gradients + plan.standing.moments
        assert spread == pytest.approx((16 * trained + 2 * frozen) / 8)
    assert first.standing.total < 0.4 * second.standing.total
    once = ("optimizer.name=adamw_8bit",)
    eight = planned(repo_root, "finetune", 8, 8e9, *once, "optimizer.betas=[0.9, 0.999]")
    assert eight.standing.moments == pytest.approx(second.standing.moments * 2.1 / 8)


def test_the_replicated_stage_1_holds_every_frozen_weight_on_each_gpu(repo_root: Path) -> None:
    plan = planned(repo_root, "pretrain", 8, 8e9, "trainer.parallelism_config=null")
    frozen = sum(count for count, learns in plan.parameters.values() if not learns)
    assert plan.sharding == "DDP"
    assert plan.standing.weights > 2 * frozen
    assert plan.standing.weights == pytest.approx(2 * frozen, rel=0.5)


def test_a_frozen_language_models_linear_layers_take_a_byte_in_float8(repo_root: Path) -> None:
    replicated = "trainer.parallelism_config=null"
    float8 = ("execution.frozen_weights=float8",)
    plan, small = (planned(repo_root, "pretrain", 8, 8e9, replicated, *more) for more in ((), float8))
    settings = plain(load_config(repo_root / "yamls" / "pretrain.yaml", overrides()))
    blocks = planning._empty_model(settings, "off").language_model.model.layers
    linear = sum(p.numel() for name, p in blocks.named_parameters() if name.endswith("proj.weight"))
    assert plan.standing.weights - small.standing.weights == linear > 0
    assert plan.parameters == small.parameters
    assert small.fits[0].most_tokens > plan.fits[0].most_tokens


def test_gathered_are_the_root_and_two_blocks(repo_root: Path) -> None:
    settings = plain(load_config(repo_root / "yamls" / "finetune.yaml", overrides()))
    model = planning._empty_model(settings, "off")
    block = sum(p.numel() for p in model.language_model.model.layers[0].parameters())
    root = 2 * 4000 * 512 + 512
    fsdp = {"version": 2, "reshard_after_forward": True}
    found = standing_bytes(model, fsdp, "adamw", 8).gathered
    assert found == pytest.approx(2 * (root + 2 * block) + 6 * (root + block))
    kept = standing_bytes(model, fsdp | {"reshard_after_forward": False}, "adamw", 8).gathered
    assert kept - found == pytest.approx(2 * (sum(p.numel() for p in model.parameters()) - root - 2 * block))


REPLICAS = "trainer.parallelism_config.fsdp.data_parallel_replicate_degree=8"


def test_replicas_hold_a_share_of_the_ranks_of_one_and_send_their_shard_only_to_others(repo_root: Path) -> None:
    full, hybrid, small = (
        planned(repo_root, "finetune", gpus, 8e9, *more) for gpus, more in [(64, ()), (64, (REPLICAS,)), (8, ())]
    )
    assert hybrid.sharding == full.sharding == "FSDP2" and (full.replicas, hybrid.replicas) == (1, 8)
    assert hybrid.standing == small.standing
    assert hybrid.standing.moments == pytest.approx(8 * full.standing.moments)
    assert hybrid.traffic.within == small.traffic.within < full.traffic.within
    assert full.traffic.between == small.traffic.between == 0
    trained = sum(count for count, learns in hybrid.parameters.values() if learns)
    assert hybrid.traffic.between == pytest.approx(2 * 4 * trained / 8 * 7 / 8)


def test_a_gpu_sends_weights_twice_and_gradients_once_and_frozen_encoders_once() -> None:
    counts = {"vision_encoder": (100, 0), "projector": (10, 10), "language_model": (1000, 0)}
    fsdp = {"version": 2, "reshard_after_forward": True}
    assert traffic_of_step(counts, fsdp, 1, 4).within == pytest.approx((2 * (1110 + 1010) + 4 * 10) * 3 / 4)
    kept = traffic_of_step(counts, fsdp | {"reshard_after_forward": False}, 1, 4)
    assert kept.within == pytest.approx((2 * 1110 + 4 * 10) * 3 / 4)
    replicated = traffic_of_step(counts, None, 4, 1)
    assert (replicated.within, replicated.between) == (0, pytest.approx(2 * 4 * 10 * 3 / 4))


def test_more_gpus_than_the_batch_can_be_shared_by_are_a_mistake_and_few_samples_a_warning(repo_root: Path) -> None:
    eight, many, uneven, too_many = (planned(repo_root, "finetune", gpus, 8e9) for gpus in (16, 32, 48, 512))
    assert eight.problem is eight.warning is None
    assert many.problem is None
    assert many.warning is not None and many.warning.startswith("4 samples a GPU in a step: GPUs wait")
    assert "16 GPUs or fewer hold 8" in many.warning
    assert uneven.problem == ("global_batch_size 128 isn't shared evenly by 48 GPUs: take 32 of them, or another batch")
    assert too_many.problem == ("global_batch_size 128 is less than the 512 GPUs: take 128 of them, or another batch")
    assert too_many.warning is uneven.warning is None


def command(
    capsys: pytest.CaptureFixture[str], repo_root: Path, *words: str, stage: str = "finetune"
) -> tuple[int, str]:
    code = main(["plan", str(repo_root / "yamls" / f"{stage}.yaml"), *overrides(), *words])
    output = capsys.readouterr()
    return code, output.out + output.err


def test_the_command_says_what_fits_how_long_and_at_what_cost(
    capsys: pytest.CaptureFixture[str], repo_root: Path
) -> None:
    words = ["--gpus", "8", "--gpu-memory", "8GB", "--tokens", "300", "--answers", "100", "--samples", "1280000"]
    code, output = command(capsys, repo_root, *words, "--price", "2", "--mfu", "0.5")
    assert code == 0
    for part in (
        "8 GPUs of 8 GB, FSDP2",
        "language_model",
        "trained",
        "<- this YAML",
        "this YAML fits",
        "TFLOP",
        "H200",
    ):
        assert part in output
    plan = planned(repo_root, "finetune", 8, 8e9)
    hours = 1280000 * plan.flops.total / (8 * 989e12 * 0.5) / 3600
    assert f"1,280,000 samples: {hours:.1f} hours, {hours * 8:.0f} GPU hours" in output
    assert f"at 2 a GPU hour: {hours * 16:,.0f}" in output


def test_what_does_not_fit_ends_with_1_and_says_what_would(capsys: pytest.CaptureFixture[str], repo_root: Path) -> None:
    sizes = ["--tokens", "300", "--answers", "100", "--gpu-memory"]
    tight = planned(repo_root, "finetune", 8, 0.3e9)
    assert tight.chosen_fit.most_tokens < tight.wanted_tokens
    code, output = command(capsys, repo_root, *sizes, "0.3GB")
    assert code == 1 and "this YAML doesn't fit: max_tokens_per_microbatch" in output
    assert tight.best is not None and f"execution.activation_checkpointing={tight.best.checkpointing}" in output
    code, output = command(capsys, repo_root, *sizes, "0.15GB")
    assert code == 1 and "no kind of checkpointing fits" in output


def test_the_command_says_replicas_traffic_and_what_is_against_so_many_gpus(
    capsys: pytest.CaptureFixture[str], repo_root: Path
) -> None:
    sizes = ["--tokens", "300", "--answers", "100", "--gpu-memory", "8GB"]
    code, output = command(capsys, repo_root, *sizes, "--gpus", "64", REPLICAS)
    assert code == 0 and "64 GPUs of 8 GB, FSDP2, 8 replicas of 8" in output
    assert "warning: 2 samples a GPU in a step" in output
    sent = planned(repo_root, "finetune", 64, 8e9, REPLICAS).traffic
    said = f"{sent.within / 1e9:.1f} GB in its replica, {sent.between / 1e9:.1f} GB between replicas"
    assert f"a GPU sends in each microbatch: {said}" in output
    code, output = command(capsys, repo_root, *sizes, "--gpus", "512", REPLICAS)
    assert code == 1 and "can't start: global_batch_size 128 is less than the 512 GPUs" in output


WRONG: dict[str, tuple[list[str], str]] = {
    "memory": (["--gpu-memory", "80"], "must be a size such as 80GB, found '80'"),
    "gpus": (["--gpus", "0"], "--gpus: must be at least 1, found 0"),
    "samples": (["--samples", "0"], "--samples: must be at least 1, found 0"),
    "price": (["--price", "nan"], "--price: must be at least 0, found nan"),
    "mfu": (["--mfu", "45"], "--mfu: must lie between 0 and 1, found 45.0"),
    "replicas": (["--gpus", "12", REPLICAS], "replicate_degree: found 8, but 12 ranks can't be divided"),
    "answers": (["--tokens", "200", "--answers", "100"], "has no room for 100 answer tokens and 1 images of 128"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_can_not_be_planned_is_said_in_one_line(
    case: str, capsys: pytest.CaptureFixture[str], repo_root: Path
) -> None:
    words, message = WRONG[case]
    code, output = command(capsys, repo_root, *words)
    assert code == 2 and message in output and len(output.strip().splitlines()) == 1


def test_memory_is_read_as_on_datasheets() -> None:
    assert parse_memory("80GB") == 80e9 and parse_memory("131 GiB") == 131 * 2**30


def test_a_plan_holds_only_numbers_of_the_run(finetune: Plan) -> None:
    def leaves(value: Any) -> list[Any]:
        if isinstance(value, dict):
            return [leaf for item in value.values() for leaf in leaves(item)]
        return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list | tuple) else [value]

    assert all(isinstance(leaf, int | float | str | bool) for leaf in leaves(dataclasses.asdict(finetune)))
