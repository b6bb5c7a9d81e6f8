"""The road from a YAML to weights: what a run leaves, what stage 1 leaves alone, exact resuming, equal numbers."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import (
    BARE,
    LANGUAGE_MODEL,
    Interrupted,
    Witness,
    convert_shards,
    end_group,
    largest_error,
    load_tiny_config,
    road,
    run,
    two_steps,
    weights_of,
)
from warm_process import popen

from composer_path import PathMLLM
from composer_path.config.reading import plain
from composer_path.run.trainer import StepTrainer
from composer_path.train import build_model, main

# Losses of the tiny finetuning run (tests/tiny_run.py) on torch 2.7.0 and transformers 4.53.3, CPU.
GOLDEN_LOSSES = [10.408156, 10.404998, 10.244213, 10.065053, 9.906722, 9.791209]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return road(tmp_path_factory.getbasetemp() / "road")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_shards(tmp_path_factory.getbasetemp() / "road" / "shards")


@pytest.fixture(scope="module")
def pretrained(runs: Path) -> dict[str, Any]:
    return torch.load(runs / "pretrain.pt")


@pytest.fixture(scope="module")
def finetuned(runs: Path) -> dict[str, Any]:
    return torch.load(runs / "finetune.pt")


def scalars(folder: Path) -> dict[str, list[float]]:
    """What TensorBoard shows of the event files of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = sorted(folder.glob("events.*"), key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])
    assert files
    values: dict[str, list[float]] = {}
    for file in files:
        accumulator = EventAccumulator(str(file)).Reload()
        for tag in accumulator.Tags()["scalars"]:
            values.setdefault(tag, []).extend(event.value for event in accumulator.Scalars(tag))
    return values


def checkpoint_names(folder: Path) -> set[str]:
    """Names of all that a sharded checkpoint holds."""
    from torch.distributed.checkpoint import FileSystemReader

    return set(FileSystemReader(str(folder.resolve())).read_metadata().state_dict_metadata)


# --- what a run leaves -----------------------------------------------------------------------------------------------


def test_pretraining_leaves_the_projector_the_configuration_and_a_summary(
    runs: Path, pretrained: dict[str, Any]
) -> None:
    folder = runs / "pretrain"
    names = {path.name for path in folder.iterdir()}
    assert {"projector.safetensors", "mm_projector.bin", "config.json", "config.yaml", "summary.json"} <= names
    assert not [name for name in names if name.endswith(".partial")]
    written = load_file(folder / "projector.safetensors")
    trained = {key: value for key, value in pretrained["weights"].items() if key.startswith("projector.")}
    assert {f"projector.{key.removeprefix('projector.')}" for key in written} == set(trained)
    for key, value in trained.items():
        assert torch.equal(written.get(key, written.get(key.removeprefix("projector."))), value), key
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["run"], summary["steps"], summary["samples"]) == ("pretrain", 6, 48)
    assert summary["heldout_token_loss"]["after"] < summary["heldout_token_loss"]["before"]
    assert summary["parameters"]["trained"] == sum(value.numel() for value in trained.values())


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_tensorboard_shows_loss_rates_gradients_speed_and_what_batches_hold(runs: Path, stage: str) -> None:
    values = scalars(runs / stage / "runs" / stage)
    notes = torch.load(runs / f"{stage}.pt")
    assert values["loss/train/total"] == pytest.approx(list(notes["losses"].values()), rel=1e-6)
    assert len(values["lr-AdamW/group0"]) == 6
    assert all(value > 0 for value in values["l2_norm/grad/global"])
    for tag in ("throughput/samples_per_sec", "throughput/tokens_per_sec"):
        assert values[tag] and min(values[tag]) > 0
    for tag in ("batch/supervised_share", "batch/padding_avoided"):
        assert len(values[tag]) == 6 and 0 < min(values[tag]) <= max(values[tag]) < 1
    assert len(values["metrics/heldout/token_loss"]) == 3  # before, and after each epoch


def test_finetuning_starts_from_the_projector_of_pretraining_and_trains_all_but_the_vision_encoder(
    runs: Path, pretrained: dict[str, Any], finetuned: dict[str, Any]
) -> None:
    shards = runs / "shards"
    start = build_model(plain(load_tiny_config("finetune", shards, runs))).state_dict()
    projector = [key for key in start if key.startswith("projector.")]
    assert projector
    for key in projector:
        assert torch.equal(start[key], pretrained["weights"][key]), key
    changed = {key for key, value in finetuned["weights"].items() if not torch.equal(value, start[key])}
    assert changed == {key for key in finetuned["weights"] if not key.startswith("vision_encoder.")}


def test_finetuning_leaves_a_folder_that_loads_to_the_trained_weights(runs: Path, finetuned: dict[str, Any]) -> None:
    folder = runs / "finetune" / "model"
    model = PathMLLM.from_pretrained(folder)
    for key, value in model.state_dict().items():
        trained = finetuned["weights"][key]
        assert torch.equal(value[: len(trained)] if value.ndim else value, trained), key  # but for the image's row
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer_config.json"} <= names
    assert json.loads((folder / "processor_config.json").read_text())["template"] == "llava_llama_2"


# --- stage 1 leaves the rest alone -----------------------------------------------------------------------------------


def test_stage_1_has_gradients_and_checkpoint_entries_of_the_projector_only(
    runs: Path, pretrained: dict[str, Any]
) -> None:
    projector = {key for key in pretrained["weights"] if key.startswith("projector.")}
    assert set(pretrained["gradients"]) == projector
    names = checkpoint_names(runs / "pretrain" / "checkpoints" / "latest")
    assert {name.removeprefix("state.model.model.") for name in names if name.startswith("state.model.")} == projector
    optimizer = [name for name in names if name.startswith("state.optimizers.")]
    assert any("exp_avg_sq" in name for name in optimizer)
    assert not [name for name in optimizer if "vision_encoder" in name or "language_model" in name]


def test_stage_1_leaves_frozen_weights_bit_for_bit(runs: Path, pretrained: dict[str, Any]) -> None:
    start = build_model(plain(load_tiny_config("pretrain", runs / "shards", runs))).state_dict()
    for key, value in pretrained["weights"].items():
        assert torch.equal(value, start[key]) == (not key.startswith("projector.")), key


def test_frozen_modules_are_held_in_bf16_when_the_compute_is_and_ropes_frequencies_stay_fp32(
    shards: Path, tmp_path: Path
) -> None:
    more = ["trainer.precision=amp_bf16", "trainer.parallelism_config.fsdp.mixed_precision=DEFAULT"]
    config = load_tiny_config("pretrain", shards, tmp_path, [*more, *BARE, "trainer.max_duration=2ba"])
    trainer, witness = run(config)
    model = trainer.state.model.model
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {dtypes[name] for name in dtypes if name.startswith("projector.")} == {torch.float32}
    assert {dtypes[name] for name in dtypes if not name.startswith("projector.")} == {torch.bfloat16}
    assert {buffer.dtype for name, buffer in model.named_buffers() if name.endswith("inv_freq")} == {torch.float32}
    assert {gradient.dtype for gradient in witness.gradients.values()} == {torch.float32}
    start = build_model(plain(load_tiny_config("pretrain", shards, tmp_path))).state_dict()
    for key, value in weights_of(trainer).items():
        if not key.startswith("projector."):
            assert torch.equal(value, start[key].bfloat16()), key


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stops", "interval", "names"),
    [
        ([2, 5], "1ba", {"ep1-ba5", "ep2-ba6"}),
        ([3], "3ba", {"ep1-ba3", "ep2-ba6"}),
        ([3], "1ep", {"ep1-ba3", "ep2-ba6"}),
    ],
    ids=["mid_epoch_and_second_epoch", "last_batch", "epoch_end"],
)
def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(
    runs: Path, finetuned: dict[str, Any], tmp_path: Path, stops: list[int], interval: str, names: set[str]
) -> None:
    more = [
        f"model.projector.weights={runs}/pretrain/projector.safetensors",
        f"trainer.save_interval={interval}",
        "trainer.save_num_checkpoints_to_keep=2",
        "trainer.eval_interval=99ep",  # but for the one before the first step
    ]
    config = load_tiny_config("finetune", runs / "shards", tmp_path, more)
    losses: dict[int, float] = {}
    samples: dict[int, list[int]] = {}
    for first, stop in itertools.pairwise([0, *stops, 6]):
        witness = Witness(stop if stop < 6 else None)
        with pytest.raises(Interrupted) if stop < 6 else contextlib.nullcontext():
            trainer, _ = run(config, witness)
        assert list(witness.losses) == list(range(first, stop))
        losses |= witness.losses
        samples |= witness.samples
    assert samples == finetuned["samples"]
    assert losses == finetuned["losses"]
    weights = weights_of(trainer)
    assert all(torch.equal(value, finetuned["weights"][key]) for key, value in weights.items())
    kept = {path.name for path in (tmp_path / "finetune" / "checkpoints").glob("ep*")}
    assert kept == names  # of all processes together, the newest two
    assert summary_of(tmp_path)["heldout_token_loss"]["before"] == summary_of(runs)["heldout_token_loss"]["before"]


def summary_of(root: Path) -> dict[str, Any]:
    return json.loads((root / "finetune" / "summary.json").read_text())


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_the_debug_runs_losses_are_the_committed_ones(finetuned: dict[str, Any]) -> None:
    """They change with the random weights, the data of test_data or the arithmetic; only one of these may be meant."""
    assert list(finetuned["losses"].values()) == pytest.approx(GOLDEN_LOSSES, rel=1e-4)  # measured 1e-7 on this version


def test_every_sample_is_seen_once_an_epoch_in_another_order_each(finetuned: dict[str, Any]) -> None:
    steps = finetuned["samples"]
    first, second = ([sample for at in epoch for sample in steps[at]] for epoch in (range(3), range(3, 6)))
    assert sorted(first) == sorted(second) == list(range(24))
    assert [steps[at] for at in range(3)] != [steps[at] for at in range(3, 6)]


@pytest.mark.parametrize("loss_average", ["token", "sample", "square"])
def test_the_size_of_microbatches_changes_nothing(runs: Path, loss_average: str) -> None:
    average = [f"train_loader.loss_average={loss_average}"] if loss_average != "token" else []
    small = two_steps(runs, "train_loader.max_tokens_per_microbatch=320", *average)
    large = two_steps(runs, *average)
    assert min(small["metrics"]["batch/microbatches"]) >= 3
    assert max(large["metrics"]["batch/microbatches"]) == 1
    assert list(small["losses"].values()) == pytest.approx(list(large["losses"].values()), rel=1e-5)  # measured 1e-7
    assert largest_error(small["gradients"], large["gradients"]) < 1e-5  # measured 4e-7
    assert largest_error(small["weights"], large["weights"]) < 1e-5  # measured 1e-7


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_how_a_step_is_computed_changes_nothing_under_fsdp(runs: Path, checkpointing: str) -> None:
    levers = (
        f"execution={{activation_checkpointing: {checkpointing}, loss_chunk: 7, vision_chunk: 2, row_multiple: 64}}"
    )
    plain, other = two_steps(runs), two_steps(runs, levers)
    assert list(other["losses"].values()) == pytest.approx(list(plain["losses"].values()), rel=1e-5)
    assert largest_error(other["gradients"], plain["gradients"]) < 1e-5
    assert largest_error(other["weights"], plain["weights"]) < 1e-5


# --- the product's YAMLs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def product(shards: Path, repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages of the product, the first started as a user does; paths and sizes are overridden, nothing else."""
    root = tmp_path_factory.mktemp("product")
    paths = {
        "save_root": root,
        "tokenizer.path": repo_root / "test_data" / "tokenizer",
        "model.vision_encoder.weights": "null",
        "model.language_model.path": "null",
    }
    sizes = {
        "model.vision_encoder.image_size": 32,
        "model.vision_encoder.kwargs": "{embed_dim: 24, depth: 2, num_heads: 2}",
        "model.projector.pooler": "{dim: 16, num_queries: 4, num_heads: 2}",
        "model.language_model.config": LANGUAGE_MODEL,
        "train_loader.dataset.max_seq_len": 320,
        "train_loader.global_batch_size": 8,
        "train_loader.num_workers": 1,
        "eval_loader.global_batch_size": 8,
        "eval_loader.num_workers": 0,
        "trainer.max_duration": "2ba",
    }

    def arguments(stage: str, data: str, held_out: str, **more: str) -> list[str]:
        local = {"train_loader.dataset.local": shards / data, "eval_loader.dataset.local": shards / held_out}
        overrides = [f"{key}={value}" for key, value in (paths | sizes | local | more).items()]
        return [str(repo_root / "yamls" / f"{stage}.yaml"), *overrides]

    first = arguments("pretrain", "captions", "heldout_captions", **{"model.projector.pooler_weights": "null"})
    process = popen(
        [str(Path(sys.executable).parent / "composer"), "-n", "1", str(repo_root / "train.py"), *first],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=300)[0]
    finally:
        end_group(process.pid)
    assert process.returncode == 0, output[-6000:]
    (root / "pretrain.log").write_text(output)
    assert main(arguments("finetune", "train", "heldout")) == 0  # takes the projector that pretraining left
    return root


def test_the_product_starts_on_test_data_with_random_weights_by_paths_and_sizes_only(product: Path) -> None:
    for stage in ("pretrain", "finetune"):
        summary = json.loads((product / stage / "summary.json").read_text())
        assert (summary["steps"], summary["samples"]) == (2, 16)
        assert list((product / stage / "runs").rglob("events.*"))
    assert "pretrain step 2/2  loss" in (product / "pretrain.log").read_text()
    assert (product / "pretrain" / "projector.safetensors").exists()
    assert PathMLLM.from_pretrained(product / "finetune" / "model").vision_encoder.image_size == 32


def test_on_a_cpu_the_product_says_that_it_computes_in_bf16_another_way(product: Path) -> None:
    assert "computes in bf16 through FSDP's mixed precision" in (product / "pretrain.log").read_text()
    weights = load_file(product / "finetune" / "model" / "model.safetensors")
    dtypes = {name.split(".")[0]: value.dtype for name, value in weights.items()}
    # The widest that is there: other programs load a folder in one.
    assert dtypes == dict.fromkeys(("vision_encoder", "projector", "language_model"), torch.float32)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_lists_mistakes_and_builds_nothing(
    repo_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml = str(repo_root / "yamls" / "demo" / "pretrain.yaml")
    with pytest.raises(SystemExit):
        main([])
    assert main([yaml, f"save_root={tmp_path}", "optimizer.lrr=1", "trainer.max_duration=soon"]) == 2
    printed = capsys.readouterr().err
    assert (
        "the following arguments are required: YAML" in printed
        and "optimizer.lrr" in printed
        and "trainer.max_duration" in printed
    )
    assert main([yaml, f"save_root={tmp_path}", "--check"]) == 0
    assert "no mistake found; files were not looked for (--files does)" in capsys.readouterr().out
    assert main([yaml, f"save_root={tmp_path}", "variables.shards=nowhere", "--check", "--files"]) == 2
    assert "train_loader.dataset.local: found no index.json" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def odd_steps(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Any, Path]:
    """24 samples in steps of five on three canonical nodes, which divide neither; the rate is constant."""
    words = ["train_loader.global_batch_size=5", "train_loader.dataset.num_canonical_nodes=3", "eval_loader=null"]
    words += ["scheduler.alpha_f=1.0", "trainer.save_interval=1ba", "trainer.save_num_checkpoints_to_keep=-1"]
    root = tmp_path_factory.mktemp("odd_steps")
    trainer, witness = run(load_tiny_config("pretrain", shards, root, words))
    assert [len(witness.samples[step]) for step in range(10)] == [5, 5, 5, 5, 4] * 2
    for epoch in range(2):
        found = [sample for step in range(5) for sample in witness.samples[5 * epoch + step]]
        assert sorted(found) == list(range(24))
    return words, witness.notes() | {"weights": weights_of(trainer)}, root / "pretrain" / "checkpoints"


@pytest.mark.parametrize("durations", [("2ba", "8ba"), ("5ba", "5ba"), ("7ba", "1ba", "2ba"), ("1ep", "1ep")])
def test_fit_in_several_calls_is_one(
    durations: tuple[str, ...], odd_steps: tuple, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, expected, _ = odd_steps
    fit = StepTrainer.fit
    monkeypatch.setattr(StepTrainer, "fit", lambda trainer: [fit(trainer, duration=part) for part in durations])
    trainer, witness = run(load_tiny_config("pretrain", shards, tmp_path, [*words, *BARE]))
    assert (witness.samples, witness.losses) == (expected["samples"], expected["losses"])
    assert largest_error(weights_of(trainer), expected["weights"]) == 0


@pytest.mark.parametrize("step", [4, 5, 6])
def test_a_run_resumed_around_an_epochs_end_has_the_undisturbed_ones_steps(
    step: int, odd_steps: tuple, shards: Path, tmp_path: Path
) -> None:
    words, expected, checkpoints = odd_steps
    found = [path for path in checkpoints.iterdir() if path.name.split("-")[1:2] == [f"ba{step}"]]
    assert found
    for number, path in enumerate(found):  # at an epoch's end there may be one before and one after it
        more = [*words, *BARE, f"trainer.load_path={path}"]
        trainer, witness = run(load_tiny_config("pretrain", shards, tmp_path / str(number), more))
        assert witness.samples == {at: ids for at, ids in expected["samples"].items() if at >= step}
        assert largest_error(weights_of(trainer), expected["weights"]) == 0
