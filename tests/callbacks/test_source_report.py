"""Samples and loss of each source add up to those of the run."""

from __future__ import annotations

import pytest
import torch
from composer.core import State
from composer.devices import DeviceCPU
from composer.loggers import InMemoryLogger, Logger

from composer_path import ComposerPathMLLM
from composer_path.batches.batch import Batch, PackedCollator, split_batch
from composer_path.callbacks import SourceReport
from composer_path.weights.assembly import assemble_model

SOURCES = ("captions", "chats", "captions", "chats", "chats", "captions")
ANSWERS = (3, 1, 4, 0, 5, 2)


@pytest.fixture(scope="module")
def adapter() -> ComposerPathMLLM:
    return ComposerPathMLLM(
        assemble_model(
            vision_encoder={
                "name": "timm/vit_tiny_patch16_224",
                "image_size": 32,
                "kwargs": {"embed_dim": 24, "depth": 1, "num_heads": 2},
            },
            projector={"pooler": {"dim": 16, "num_queries": 4, "num_heads": 2}, "mlp": {"depth": 2}},
            language_model={
                "config": {
                    "model_type": "llama",
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 4,
                    "vocab_size": 96,
                }
            },
            trainable=["projector"],
        )
    )


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for index, (source, answers) in enumerate(zip(SOURCES, ANSWERS, strict=True)):
        ids = torch.randint(3, 96, (12 + index,), generator=generator)
        labels = torch.full_like(ids, -100)
        labels[len(ids) - answers :] = ids[len(ids) - answers :]
        samples.append(
            {
                "sample_id": index,
                "input_ids": ids,
                "labels": labels,
                "pixel_values": torch.empty((0, 3, 32, 32), dtype=torch.uint8),
                "is_he": torch.zeros(0, dtype=torch.bool),
                "source": source,
                "problem": None,
            }
        )
    return PackedCollator(40)(samples)


@pytest.mark.parametrize("interval", [1, 2])
def test_each_sources_loss_is_the_mean_over_its_answer_tokens(adapter: ComposerPathMLLM, interval: int) -> None:
    state = State(adapter, rank_zero_seed=0, run_name="a_run", device=DeviceCPU())
    memory = InMemoryLogger()
    logger = Logger(state, [memory])
    memory.init(state, logger)
    report = SourceReport(interval)
    batch = make_batch()
    parts = split_batch(batch, 6)
    assert len(parts) > 1
    for _ in range(2):
        state.batch = batch
        report.batch_start(state, logger)
        for state.batch in parts:
            adapter.loss(adapter(state.batch), state.batch)
            report.after_loss(state, logger)
        state.batch = batch
        state.timestamp = state.timestamp.to_next_batch(len(SOURCES))
        report.batch_end(state, logger)
    losses = adapter(batch).detach()
    owners = [source for source, count in zip(batch.sources, batch.num_targets, strict=True) for _ in range(count)]
    for source in ("captions", "chats"):
        expected = losses[[owner == source for owner in owners]].mean().item()
        logged = memory.data[f"source/{source}/loss"]
        assert len(logged) == 2 // interval
        assert logged[-1][1] == pytest.approx(expected, rel=1e-5)
        assert memory.data[f"source/{source}/samples"][-1][1] == 2 * SOURCES.count(source)


def test_counts_survive_a_resume_and_intervals_are_checked() -> None:
    report = SourceReport()
    report.load_state_dict({"seen": {"captions": 7}})
    assert report.state_dict() == {"seen": {"captions": 7}}
    with pytest.raises(ValueError, match="must be at least 1"):
        SourceReport(0)
