"""Weights are written at intervals and at the end, once a step, and what is written is what the stage trains."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Event, State, Timestamp
from composer.devices import DeviceCPU
from composer.loggers import Logger
from safetensors.torch import load_file

from composer_path import PathMLLM
from composer_path.asking.run_table import EVALUATION
from composer_path.callbacks import SaveWeights
from composer_path.checkpoints.manifest import CheckpointError
from composer_path.checkpoints.trained_only import TrainedOnly
from composer_path.images.pixels import ImagePreparation
from composer_path.records.prompts import get_template
from composer_path.records.tokenize import TextPreparation
from composer_path.records.vocabulary import load_tokenizer
from composer_path.weights.assembly import assemble_model
from composer_path.weights.projector_file import REFERENCE_BIN, SAFETENSORS, build_projector

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 96}


def saver_of(folder: Path, tokenizer: Any, trainable: list[str], **keywords: Any) -> SaveWeights:
    model = assemble_model(
        vision_encoder={
            "name": "timm/vit_tiny_patch16_224",
            "image_size": 32,
            "kwargs": {"embed_dim": 24, "depth": 1, "num_heads": 2},
        },
        projector={"pooler": {"dim": 16, "num_queries": 4, "num_heads": 2}, "mlp": {"depth": 2}},
        language_model={"config": {"model_type": "llama", **SIZES}},
        trainable=trainable,
    )
    trained_only = TrainedOnly(model)
    trained_only.active = True  # as in a run
    return SaveWeights(
        **keywords,
        run_folder=folder,
        model=model,
        trained_only=trained_only,
        tokenizer=tokenizer,
        text=TextPreparation(get_template("plain"), 4),
        images=ImagePreparation(32),
    )


@pytest.fixture(scope="module")
def tokenizer(mistral_tokenizer_path: Path) -> Any:
    return load_tokenizer(mistral_tokenizer_path)


def saver_state(saver: SaveWeights) -> dict[str, Any]:
    with saver.trained_only.everything():
        return saver.model.state_dict()


def saved_at(saver: SaveWeights, monkeypatch: pytest.MonkeyPatch, duration: str, batches_in_epoch: int) -> list[int]:
    """The steps at whose checkpoint events of a made-up run it saves."""
    steps: list[int] = []
    state = State(torch.nn.Linear(1, 1), rank_zero_seed=0, run_name="a", device=DeviceCPU(), max_duration=duration)
    state.set_dataloader(range(batches_in_epoch), "train")
    monkeypatch.setattr(saver, "save", lambda: steps.append(state.timestamp.batch.value))
    logger = Logger(state)
    total = int(duration.removesuffix("ep")) * batches_in_epoch if duration.endswith("ep") else int(duration[:-2])
    for batch in range(1, total + 1):
        epoch, within = divmod(batch, batches_in_epoch)
        before = Timestamp(
            epoch=(batch - 1) // batches_in_epoch, batch=batch, batch_in_epoch=within or batches_in_epoch
        )
        state.previous_timestamp, state.timestamp = before.copy(batch=batch - 1), before
        saver.run_event(Event.BATCH_END, state, logger)
        saver.run_event(Event.BATCH_CHECKPOINT, state, logger)
        if within == 0:
            state.previous_timestamp, state.timestamp = before, before.copy(epoch=epoch, batch_in_epoch=0)
            saver.run_event(Event.EPOCH_CHECKPOINT, state, logger)
    return steps


@pytest.mark.parametrize(
    ("interval", "duration", "steps"),
    [
        ("1ep", "2ep", [3, 6]),
        ("2ep", "3ep", [6, 9]),
        ("2ba", "5ba", [2, 4, 5]),
        ("2ba", "2ep", [2, 4, 6]),
        ("99ba", "4ba", [4]),
    ],
)
def test_it_saves_at_intervals_and_at_the_end_and_no_step_twice(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, interval: str, duration: str, steps: list[int]
) -> None:
    saver = saver_of(tmp_path, tokenizer, ["projector"], interval=interval)
    assert saved_at(saver, monkeypatch, duration, batches_in_epoch=3) == steps


def test_stage_1_writes_the_projector_in_both_formats_and_no_model(tmp_path: Path, tokenizer: Any) -> None:
    saver = saver_of(tmp_path, tokenizer, ["projector"])
    saver.save()
    assert {path.name for path in tmp_path.iterdir()} == {SAFETENSORS, REFERENCE_BIN, "config.json"}
    written = load_file(tmp_path / SAFETENSORS)
    assert sum(value.numel() for value in written.values()) == sum(
        p.numel() for p in saver.model.projector.parameters()
    )


@pytest.mark.parametrize("trainable", [["projector", "language_model"], ["language_model"], ["vision_encoder"]])
def test_any_other_stage_writes_a_whole_model(tmp_path: Path, tokenizer: Any, trainable: list[str]) -> None:
    saver = saver_of(tmp_path, tokenizer, trainable)
    saver.save()
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    loaded = PathMLLM.from_pretrained(tmp_path / "model").state_dict()
    with saver.trained_only.everything():
        for name, value in saver.model.state_dict().items():  # behind the vocabulary's rows is the image token's
            assert torch.equal(loaded[name][: len(value)], value), name


@pytest.mark.parametrize("part", ["mlp", "pooler", "ln"])
def test_a_part_that_is_frozen_later_stays_in_the_file_which_the_next_stage_takes(
    tmp_path: Path, tokenizer: Any, part: str
) -> None:
    saver = saver_of(tmp_path, tokenizer, ["projector"])
    getattr(saver.model.projector, part).requires_grad_(False)
    saver.save()
    again = build_projector(
        **saver.model.projector.config, weights=str(tmp_path), vision_encoder=saver.model.vision_encoder
    )
    for name, value in saver.model.projector.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("frozen", ["language_model", "projector", "all"])
def test_a_module_that_is_frozen_later_changes_nothing_of_what_a_stage_writes(
    tmp_path: Path, tokenizer: Any, frozen: str
) -> None:
    saver = saver_of(tmp_path, tokenizer, ["projector", "language_model"])
    (saver.model if frozen == "all" else getattr(saver.model, frozen)).requires_grad_(False)
    saver.save()
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    assert PathMLLM.from_pretrained(tmp_path / "model").state_dict().keys() == saver_state(saver).keys()


@pytest.mark.parametrize("trainable", [["projector"], ["projector", "language_model"]])
def test_weights_that_are_not_finite_are_refused_by_name_and_the_earlier_files_stay(
    tmp_path: Path, tokenizer: Any, trainable: list[str]
) -> None:
    saver = saver_of(tmp_path, tokenizer, trainable)
    saver.save()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with torch.no_grad():
        saver.model.projector.ln.weight[2] = float("nan")
    with pytest.raises(
        CheckpointError, match=r"isn't written: 1 tensors hold NaN or infinity: (projector\.)?ln\.weight"
    ):
        saver.save()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("trainable", [["projector"], ["projector", "language_model"]])
def test_an_evaluation_of_an_earlier_model_goes_with_it(tmp_path: Path, tokenizer: Any, trainable: list[str]) -> None:
    saver = saver_of(tmp_path, tokenizer, trainable)
    saver.save()
    place = tmp_path if trainable == ["projector"] else tmp_path / "model"
    (place / EVALUATION).write_text("{}")
    saver.save()
    assert (place / "config.json").exists() and not (place / EVALUATION).exists()


@pytest.mark.parametrize("trainable", [["projector"], ["projector", "language_model"]])
def test_all_that_is_written_has_the_rights_that_the_users_mask_leaves(
    tmp_path: Path, tokenizer: Any, trainable: list[str]
) -> None:
    before = os.umask(0o027)
    try:
        saver_of(tmp_path, tokenizer, trainable).save()
    finally:
        os.umask(before)
    written = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert len(written) >= 3 and set(written.values()) == {0o640}, written


def test_a_later_save_replaces_the_earlier_one(tmp_path: Path, tokenizer: Any) -> None:
    saver = saver_of(tmp_path, tokenizer, ["projector", "language_model"], dtype="bf16")
    saver.save()
    with torch.no_grad():
        saver.model.projector.ln.weight.fill_(2.0)
    saver.save()
    loaded = PathMLLM.from_pretrained(tmp_path / "model")
    assert loaded.projector.ln.weight.dtype == torch.bfloat16 and (loaded.projector.ln.weight == 2).all()
    assert not list(tmp_path.rglob("*.partial"))
