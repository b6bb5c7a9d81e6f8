"""Optimizers by name, and parts of one's own, on two ranks: what they learn is what one rank learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launched_ranks import launch
from tiny_run import TWO_STEPS, convert_shards, load_tiny_config, run, weights_of

from composer_path.own_parts.registry import set_parts

pytestmark = [pytest.mark.slow]
PARTS = """
import torch
from composer.core import Algorithm, Callback, Event
from torch import nn

from composer_path.models.projector import Projector


class Darker(Algorithm):
    def __init__(self, share: float = 0.5) -> None:
        self.share = share

    def match(self, event, state) -> bool:
        return event == Event.BATCH_START

    def apply(self, event, state, logger) -> None:
        darker = state.batch.pixel_values.float() * self.share
        state.batch.pixel_values.copy_(darker.to(torch.uint8))


class StepCounter(Callback):
    def batch_end(self, state, logger) -> None:
        logger.log_metrics({"own/step": state.timestamp.batch.value})


class HalvedProjector(Projector):
    def __init__(self, in_dim: int, out_dim: int, width: int = 16) -> None:
        super().__init__(in_dim, out_dim)
        self.layers = nn.Sequential(nn.Linear(in_dim, width), nn.Tanh(), nn.Linear(width, out_dim))

    def project(self, features):
        return self.layers(features[:, ::2])

    def num_vectors(self, num_tokens: int) -> int:
        return (num_tokens + 1) // 2


class SlowSteps(torch.optim.SGD):
    def __init__(self, params, lr: float = 1e-2, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=0.5)
"""
OPTIMIZERS: dict[str, list[str]] = {
    **{name: [] for name in ("lion", "adamax", "nadam", "radam", "adagrad", "rmsprop", "decoupled_sgdw")},
    "adafactor": ["trainer.parallelism_config=null"],
}


def test_what_names_mean_is_the_same_on_two_ranks(tmp_path: Path) -> None:
    shards = convert_shards(tmp_path / "shards")
    (tmp_path / "own_two.py").write_text(PARTS)
    start = ["model.projector.weights=null", *TWO_STEPS]
    cases = {
        name: [*start, *more, "optimizer=null", f"optimizer={{name: {name}, lr: 1.0e-3, weight_decay: 0.01}}"]
        for name, more in OPTIMIZERS.items()
    }
    cases["own"] = [
        *TWO_STEPS,
        f"imports=[{tmp_path / 'own_two.py'}]",
        *("optimizer=null", "optimizer={name: slow_steps, lr: 1.0e-2}"),
        *("model.projector=null", "model.projector={type: halved_projector, image_marks: true, kwargs: {width: 8}}"),
        *("algorithms={darker: {share: 0.25}}", "callbacks.step_counter={}"),
    ]
    (tmp_path / "two").mkdir()
    legs = [{"name": name, "stage": "finetune", "overrides": [*words]} for name, words in cases.items()]
    try:
        launched = launch(2, "two_ranks.py", legs, shards, tmp_path / "two")
        assert launched.returncode == 0, launched.output[-4000:]
        for name, words in cases.items():
            trainer, witness = run(load_tiny_config("finetune", shards, tmp_path / "one" / name, words))
            first, second = launched.notes[name]
            assert list(first["losses"].values()) == pytest.approx(list(witness.losses.values()), rel=1e-4), name
            alone: dict[str, Any] = weights_of(trainer)
            assert all(torch.equal(first["weights"][one], second["weights"][one]) for one in alone), name
            # A sign, or a division by a root near 0, turns rounding into a step: few weights are off by more.
            off = torch.cat([(first["weights"][one] - alone[one]).abs().flatten() for one in alone])
            assert (off > 1e-5).float().mean() < 1e-3, name
        assert witness.metrics["own/step"] == [1, 2] and "projector.marks" in alone
        assert list(launched.notes["own"][1]["metrics"]["own/step"]) == [1, 2]
    finally:
        set_parts(())
