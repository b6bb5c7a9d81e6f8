"""Two ranks equal one: FSDP2 and DDP on gloo, batches without images, an empty start, checkpoints of other sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
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

from composer_path import ComposerPathMLLM, PathMLLM
from composer_path.batches.batch import split_batch
from composer_path.config.reading import plain
from composer_path.models.parameters import cast_parameters
from composer_path.records.vocabulary import load_tokenizer
from composer_path.run import sharding
from composer_path.run.sharding import build_parallelism_config
from composer_path.train import build_loader, build_model
from composer_path.weights.assembly import assemble_model

DDP = ["trainer.parallelism_config=null"]
BF16 = ["trainer.parallelism_config.fsdp.mixed_precision={param_dtype: bf16, reduce_dtype: fp32}"]
SMALL = ["trainer.max_duration=1ba", "train_loader.max_tokens_per_microbatch=320"]  # one step of several microbatches
# One sample a rank and step, in the order of the shards, where every second one has no image.
ALTERNATING = ["train_loader.dataset.shuffle=false", "train_loader.global_batch_size=2"]

# The second step has one sample for two ranks.
ONE_LEFT = ["train_loader.dataset.epoch_size=9", "train_loader.global_batch_size=8"]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages on one rank."""
    return road(tmp_path_factory.getbasetemp() / "road")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_shards(tmp_path_factory.getbasetemp() / "road" / "shards")


@pytest.fixture(scope="module")
def alternating(shards: Path) -> str:
    """Shards in which a conversation over an image and one without take turns."""
    from composer_path.conversion.convert import convert

    records = json.loads((shards / "train.json").read_text(encoding="utf-8"))
    without = [record for record in records if not record.get("image")]
    mixed = [record for pair in zip(records, without, strict=False) for record in pair]
    data = shards / "alternating.json"
    data.write_text(json.dumps(mixed), encoding="utf-8")
    if not (shards / "alternating").exists():
        convert(data, REPO_ROOT / "test_data" / "imgs", shards / "alternating")
    return f"train_loader.dataset.local={shards / 'alternating'}"


@pytest.fixture(scope="module")
def two_ranks(
    one_rank: Path, shards: Path, alternating: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """All runs that need two processes, in one start of them; the last one loses a rank."""
    folder = tmp_path_factory.mktemp("two_ranks")
    projector = f"model.projector.weights={one_rank}/pretrain/projector.safetensors"
    whole = [
        projector,
        "trainer.save_interval=2ba",
        "trainer.save_num_checkpoints_to_keep=-1",
        "eval_loader=null",
    ]
    short = [projector, *TWO_STEPS, "trainer.max_duration=1ba"]
    legs = [
        {"name": "unmended", "stage": "finetune", "overrides": short, "unmended": True},
        {"name": "whole", "stage": "finetune", "overrides": whole},
        {"name": "fsdp2", "stage": "finetune", "overrides": [projector, *TWO_STEPS]},
        {"name": "ddp", "stage": "finetune", "overrides": [projector, *TWO_STEPS, *DDP]},
        {"name": "stage1_bf16", "stage": "pretrain", "overrides": [*TWO_STEPS, *BF16]},
        {"name": "text_fsdp2", "stage": "finetune", "overrides": [projector, *TWO_STEPS, *ALTERNATING, alternating]},
        {
            "name": "text_ddp",
            "stage": "finetune",
            "overrides": [projector, *TWO_STEPS, *ALTERNATING, alternating, *DDP],
        },
        {"name": "stand_in", "stage": "finetune", "overrides": [projector, *TWO_STEPS, *ONE_LEFT]},
        {"name": "killed", "stage": "finetune", "overrides": [projector, *TWO_STEPS], "dies": True},
    ]
    launched = launch(2, "two_ranks.py", legs, shards, folder)
    notes = launched.notes
    missing = {leg["name"] for leg in legs} - set(notes)
    assert missing == {"killed"}, launched.output[-6000:]
    return notes | {"folder": folder, "returncode": launched.returncode, "left_over": launched.left_over}


def on_one_rank(shards: Path, root: Path, stage: str, overrides: list[str]) -> dict[str, Any]:
    trainer, witness = run(load_tiny_config(stage, shards, root, overrides))
    return witness.notes() | {"weights": weights_of(trainer)}


@pytest.fixture(scope="module")
def baseline(one_rank: Path) -> dict[str, Any]:
    """Two steps on one rank, gradients as they come."""
    return two_steps(one_rank)


@pytest.fixture(scope="module")
def alternating_baseline(one_rank: Path, alternating: str) -> dict[str, Any]:
    """The same over conversations with and without an image."""
    return two_steps(one_rank, *ALTERNATING, alternating)


# --- two ranks -------------------------------------------------------------------------------------------------------


def test_a_whole_run_on_two_ranks_equals_one_rank(one_rank: Path, two_ranks: dict[str, Any]) -> None:
    expected = torch.load(one_rank / "finetune.pt")
    first, second = two_ranks["whole"]
    for step, samples in expected["samples"].items():
        assert sorted(first["samples"][step] + second["samples"][step]) == samples
        assert len(first["samples"][step]) == len(second["samples"][step])
    assert list(first["losses"].values()) == pytest.approx(list(expected["losses"].values()), rel=1e-5)  # 1e-7
    assert largest_error(first["weights"], expected["weights"]) < 1e-5  # measured 3e-6


@pytest.mark.parametrize("kind", ["fsdp2", "ddp"])
def test_losses_gradients_and_weights_of_two_ranks_equal_one_ranks(
    two_ranks: dict[str, Any], baseline: dict[str, Any], kind: str
) -> None:
    first = two_ranks[kind][0]
    assert list(first["losses"].values()) == pytest.approx(list(baseline["losses"].values()), rel=1e-5)  # 1e-7
    assert largest_error(first["gradients"], baseline["gradients"]) < 1e-5  # measured 2e-7
    assert largest_error(first["weights"], baseline["weights"]) < 1e-5  # measured 1e-7


@pytest.mark.parametrize("kind", ["text_fsdp2", "text_ddp"])
def test_a_rank_without_images_neither_hangs_nor_changes_the_result(
    two_ranks: dict[str, Any], alternating_baseline: dict[str, Any], kind: str
) -> None:
    images = [note["metrics"]["batch/images"] for note in two_ranks[kind]]
    assert sorted(min(counts) for counts in zip(*images, strict=True)) == [0, 0]
    assert all(max(counts) > 0 for counts in zip(*images, strict=True))
    expected, first = alternating_baseline, two_ranks[kind][0]
    assert list(first["losses"].values()) == pytest.approx(list(expected["losses"].values()), rel=1e-5)
    # measured 2e-5, on a gradient of 1e-5; 2e-7 on the others
    assert largest_error(first["gradients"], expected["gradients"]) < 1e-4


def test_under_fsdp_only_rank_0_starts_with_weights_and_every_rank_trains_them(
    two_ranks: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    for leg in ("fsdp2", "stage1_bf16"):
        assert [note["started_on"] for note in two_ranks[leg]] == [{"cpu"}, {"meta"}]
    assert [note["started_on"] for note in two_ranks["ddp"]] == [{"cpu"}, {"cpu"}]
    start = build_model(plain(load_tiny_config("pretrain", shards, tmp_path))).state_dict()
    for note in two_ranks["stage1_bf16"]:
        for name, value in note["weights"].items():
            if not name.startswith("projector."):
                assert value.dtype == torch.bfloat16 and torch.equal(value, start[name].bfloat16()), name


def test_stage_1_in_bf16_equals_one_rank(two_ranks: dict[str, Any], shards: Path, tmp_path: Path) -> None:
    expected = on_one_rank(shards, tmp_path, "pretrain", [*TWO_STEPS, *BF16])
    first = two_ranks["stage1_bf16"][0]
    assert list(first["losses"].values()) == pytest.approx(list(expected["losses"].values()), rel=1e-3)  # 3e-5
    assert largest_error(first["gradients"], expected["gradients"]) < 5e-2  # bf16's own steps: measured 1e-2


def test_a_sharded_checkpoint_of_two_ranks_goes_on_on_one(
    two_ranks: dict[str, Any], one_rank: Path, shards: Path, tmp_path: Path
) -> None:
    checkpoint = two_ranks["folder"] / "whole" / "finetune" / "checkpoints" / "ep0-ba2"
    assert len(list(checkpoint.glob("*.distcp"))) == 2
    projector = f"model.projector.weights={one_rank}/pretrain/projector.safetensors"
    more = [projector, *BARE, f"trainer.load_path={checkpoint}"]
    resumed = on_one_rank(shards, tmp_path, "finetune", more)
    expected = torch.load(one_rank / "finetune.pt")
    assert list(resumed["losses"]) == [2, 3, 4, 5]
    assert resumed["samples"] == {step: expected["samples"][step] for step in range(2, 6)}
    assert list(resumed["losses"].values()) == pytest.approx(list(expected["losses"].values())[2:], rel=1e-5)
    assert largest_error(resumed["weights"], expected["weights"]) < 1e-5


def test_a_killed_rank_ends_the_other_with_an_error(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["returncode"] != 0
    assert not two_ranks["left_over"]


# --- bf16 ------------------------------------------------------------------------------------------------------------


def test_bf16_under_fsdp_on_one_rank_is_a_bf16_model_with_fp32_masters(
    one_rank: Path, shards: Path, tmp_path: Path
) -> None:
    projector = f"model.projector.weights={one_rank}/pretrain/projector.safetensors"
    config = load_tiny_config("finetune", shards, tmp_path, [projector, *TWO_STEPS, *BF16, *SMALL])
    trainer, witness = run(config)

    settings = plain(config)
    model = build_model(settings)
    masters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    adapter = ComposerPathMLLM(cast_parameters(model, torch.bfloat16))
    loader = build_loader(settings["train_loader"], model, load_tokenizer(**settings["tokenizer"]))
    batch = next(iter(loader.dataloader))
    gradients = {name: torch.zeros_like(p) for name, p in masters.items()}
    parts = split_batch(batch, loader.dataloader.batch_size)
    for part in parts:
        (adapter.loss(adapter(part), part) * (part.loss_weight / batch.loss_weight)).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients[name] += parameter.grad.float()
                parameter.grad = None
    assert len(parts) > 1
    assert largest_error(witness.gradients, gradients) < 1e-6  # measured 0
    for name, master in masters.items():
        master.grad = gradients[name]
    torch.optim.AdamW(masters.values(), lr=2e-3, weight_decay=0.0).step()
    trained = {name: value for name, value in weights_of(trainer).items() if name in masters}
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert largest_error(trained, masters) < 1e-6  # measured 0
    saved = PathMLLM.from_pretrained(tmp_path / "finetune" / "model").state_dict()
    assert all(torch.equal(saved[name][: len(value)], value) for name, value in trained.items())  # but for its row


# --- gloo's fault ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.__version__ >= "2.13", reason="gloo averages since torch 2.13, if not earlier")
def test_without_the_mend_gloo_doubles_the_gradients_of_two_ranks(
    two_ranks: dict[str, Any], baseline: dict[str, Any]
) -> None:
    """Tells when the supported torch no longer has the fault: then `mend_gloo_averaging` can go."""
    if not torch.__version__.startswith("2.7."):
        pytest.skip("torch 2.11's gloo averages")
    doubled = {name: 2 * gradient for name, gradient in baseline["gradients"].items()}
    assert largest_error(two_ranks["unmended"][0]["gradients"], doubled) < 1e-5


def summing_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks whose reduce-scatter sums."""
    monkeypatch.setattr(sharding.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    monkeypatch.setattr(torch.distributed, "reduce_scatter_tensor", lambda out, given, op: out.fill_(given.sum()))


def test_mending_divides_by_all_ranks_and_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

    monkeypatch.setattr(
        collectives, "_get_gradient_divide_factors", collectives._get_gradient_divide_factors
    )  # put back afterwards
    summing_gloo(monkeypatch)
    assert sharding.mend_gloo_averaging()
    assert sharding.mend_gloo_averaging()

    class FourRanks:
        def size(self) -> int:
            return 4

    one_group = collectives._get_gradient_divide_factors(FourRanks(), None, torch.float32, "cpu")
    two_groups = collectives._get_gradient_divide_factors(FourRanks(), FourRanks(), torch.bfloat16)
    if len(one_group) == 2:  # torch 2.7
        assert one_group == (1.0, 4.0) and two_groups == (1.0, 16.0)
    else:  # later ones also return how to reduce
        added = (torch.distributed.ReduceOp.SUM, torch.distributed.ReduceOp.SUM)
        assert one_group == (None, 4.0, *added) and two_groups == (None, 16.0, *added)


@pytest.mark.parametrize("change", ["renamed", "other_arguments"])
def test_mending_refuses_a_torch_whose_private_function_is_another(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

    summing_gloo(monkeypatch)
    if change == "renamed":
        monkeypatch.delattr(collectives, "_get_gradient_divide_factors")
    else:
        monkeypatch.setattr(collectives, "_get_gradient_divide_factors", lambda group, dtype, factor: None)
    with pytest.raises(RuntimeError, match=r"gloo sums gradients .* does not\s+fit this version"):
        sharding.mend_gloo_averaging()


def test_nothing_is_mended_where_gloo_averages(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

    original = collectives._get_gradient_divide_factors
    summing_gloo(monkeypatch)
    monkeypatch.setattr(torch.distributed, "reduce_scatter_tensor", lambda out, given, op: out.fill_(given.mean()))
    assert not sharding.mend_gloo_averaging()
    assert collectives._get_gradient_divide_factors is original


# --- the section of the YAML -----------------------------------------------------------------------------------------


@pytest.fixture
def tiny_model() -> PathMLLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return assemble_model(
        vision_encoder={
            "name": "timm/vit_tiny_patch16_224",
            "image_size": 32,
            "kwargs": {"embed_dim": 24, "depth": 2, "num_heads": 2},
        },
        projector={"type": "linear"},
        language_model={"config": {"model_type": "llama", "vocab_size": 96, **sizes}},
        trainable=["projector"],
    )


ONE_COPY: dict[str, Any] = {"data_parallel_replicate_degree": None, "data_parallel_shard_degree": -1}


def test_the_section_becomes_composers() -> None:
    built = build_parallelism_config({"fsdp": {"version": 2, "reshard_after_forward": False, **ONE_COPY}})
    assert built is not None
    assert built["fsdp"].reshard_after_forward is False
    assert built["fsdp"].activation_checkpointing is False  # ours is another, see execution.py
    assert build_parallelism_config(None) is None
    assert build_parallelism_config({"fsdp": None}) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="FSDP1 runs where there is a GPU")
@pytest.mark.skipif(torch.__version__ >= "2.8", reason="FSDP1 is for torch 2.7")
def test_fsdp_1_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="version: 1 needs a CUDA device"):
        build_parallelism_config({"fsdp": {"version": 1, **ONE_COPY}})


def test_fsdp_1_is_not_built_where_torch_is_newer_than_2_7(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.8.0"))
    with pytest.raises(ValueError, match=r"version: 1 \(FSDP1\) is for torch 2.7, found torch 2.8.0; use version: 2"):
        build_parallelism_config({"fsdp": {"version": 1, **ONE_COPY}})


@pytest.mark.world_size(2)
def test_a_rank_without_a_sample_goes_along_and_changes_nothing(
    two_ranks: dict[str, Any], one_rank: Path, shards: Path, tmp_path: Path
) -> None:
    expected = two_steps(one_rank, *ONE_LEFT)
    steps = [[found["samples"][step] for found in two_ranks["stand_in"]] for step in range(2)]
    assert sorted(map(len, steps[1])) == [1, 1] and [-1] in steps[1]
    for step in range(2):
        samples = sorted(number for part in steps[step] for number in part if number >= 0)
        assert samples == expected["samples"][step] and len(samples) == (8, 1)[step]
    for found in two_ranks["stand_in"]:
        assert largest_error(found["weights"], expected["weights"]) < 1e-5  # 2e-6 measured
