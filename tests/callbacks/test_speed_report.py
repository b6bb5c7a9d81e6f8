"""MFU counts what a step needs, HFU what is computed."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
from composer.core import State, Timestamp
from composer.devices import DeviceCPU
from composer.loggers import InMemoryLogger, Logger

from composer_path import ComposerPathMLLM
from composer_path.batches.batch import PackedCollator
from composer_path.callbacks import SpeedReport
from composer_path.models.execution import choose_execution
from composer_path.weights.assembly import assemble_model

PEAK = 1e9


def adapter(checkpointing: str) -> ComposerPathMLLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    kwargs = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    model = assemble_model(
        vision_encoder={"name": "timm/vit_tiny_patch16_224", "image_size": 32, "kwargs": kwargs},
        projector={"type": "linear"},
        language_model={"config": {"model_type": "llama", "vocab_size": 96, **sizes}},
        trainable=["projector", "language_model"],
    )
    return ComposerPathMLLM(choose_execution(model, activation_checkpointing=checkpointing))


def sample(length: int, answers: int) -> dict[str, Any]:
    labels = torch.full((length,), -100)
    labels[length - answers :] = 5
    return {
        "sample_id": 0,
        "input_ids": torch.full((length,), 7),
        "labels": labels,
        "pixel_values": torch.zeros((1, 3, 32, 32), dtype=torch.uint8),
        "is_he": torch.zeros(1, dtype=torch.bool),
        "source": "all",
        "problem": None,
    }


def last_metrics(checkpointing: str, peak: float | None = PEAK) -> tuple[dict[str, float], ComposerPathMLLM]:
    """Three steps of half a second each, over a window of two."""
    model = adapter(checkpointing)
    state = State(model, rank_zero_seed=0, run_name="a_run", device=DeviceCPU())
    memory = InMemoryLogger()
    logger = Logger(state, [memory])
    memory.init(state, logger)
    report = SpeedReport(window_size=2, gpu_flops_available=peak)
    report.init(state, logger)
    for number in range(1, 4):
        state.batch = PackedCollator()([sample(10 * number, 3), sample(6, 2)])
        state.timestamp = Timestamp(
            batch=number, sample=2 * number, token=20 * number, total_wct=timedelta(seconds=0.5 * number)
        )
        report.batch_end(state, logger)
    return {name: values[-1][1] for name, values in memory.data.items()}, model


def test_rates_are_those_of_the_window() -> None:
    metrics, model = last_metrics("off")
    assert metrics["throughput/device/images_per_sec"] == pytest.approx(4 / 1.0)
    assert metrics["throughput/device/answer_tokens_per_sec"] == pytest.approx(10 / 1.0)
    needed = sum(model.flops.needed([10 * number, 6], 2, 5).total for number in (2, 3))
    assert metrics["throughput/device/mfu"] == pytest.approx(needed / 1.0 / PEAK, rel=1e-6)
    assert metrics["throughput/device/hfu"] == pytest.approx(metrics["throughput/device/mfu"])


def test_what_is_recomputed_counts_in_hfu_only() -> None:
    plain, _ = last_metrics("off")
    metrics, model = last_metrics("full")
    assert metrics["throughput/device/mfu"] == pytest.approx(plain["throughput/device/mfu"])
    lengths = [[20, 6], [30, 6]]
    again = sum(model.flops.recomputed(pair, 2, 5, blocks=True, head=False) for pair in lengths)
    expected = plain["throughput/device/mfu"] + again / 1.0 / PEAK
    assert metrics["throughput/device/hfu"] == pytest.approx(expected, rel=1e-6)
    assert metrics["throughput/device/hfu"] > 1.1 * metrics["throughput/device/mfu"]


def test_without_a_gpu_and_a_given_peak_there_is_no_mfu() -> None:
    metrics, _ = last_metrics("off", peak=None)
    assert "throughput/device/mfu" not in metrics and "throughput/device/hfu" not in metrics
    assert "throughput/device/flops_per_sec" in metrics


@pytest.mark.gpu
def test_the_measured_peak_of_a_gpu_is_plausible() -> None:
    from composer_path.callbacks.speed_report import measure_peak

    assert 1e12 < measure_peak(torch.device("cuda"), size=4096) < 1e16
