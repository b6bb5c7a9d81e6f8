"""Each step's learning rate: the reference's, to the step, and the one that is logged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from composer.core import State, Time, Timestamp
from composer.loggers import Logger
from tiny_run import BARE, Interrupted, Witness, convert_shards, load_tiny_config, run, weights_of

from composer_path.config.reading import plain
from composer_path.models.composer_model import ComposerPathMLLM
from composer_path.run.schedule import build_schedule
from composer_path.train import build_model

STEPS = 10
RECIPE = [*BARE, "algorithms=null", "model.projector.weights=null", f"trainer.max_duration={STEPS}ba"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_shards(tmp_path_factory.getbasetemp() / "road" / "shards")


class Rates(Witness):
    """Notes the rate that the optimizer has when it steps, the batches, and what the rate's monitor logs."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__(stop_after)
        self.used: list[float] = []
        self.logged: list[float] = []
        self.batches: list[Any] = []

    def batch_start(self, state: State, logger: Logger) -> None:
        super().batch_start(state, logger)
        self.batches.append(state.batch)

    def after_train_batch(self, state: State, logger: Logger) -> None:
        super().after_train_batch(state, logger)
        self.used.append(float(state.optimizers[0].param_groups[0]["lr"]))

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        self.logged += [float(metrics["lr-AdamW/group0"])] if "lr-AdamW/group0" in metrics else []


def of_the_recipe(step: int, steps: int, warmup_ratio: float) -> float:
    """Which share of the rate transformers' Trainer gives a step: cosine, its warm-up rounded up."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def state_at(step: int, max_duration: str, steps_an_epoch: int) -> Any:
    """What a schedule asks of a run's state."""
    state = mock.MagicMock(spec=State)
    state.max_duration = Time.from_timestring(max_duration)
    state.dataloader_len = Time(steps_an_epoch, "ba")
    state.timestamp = Timestamp(batch=step, batch_in_epoch=step)
    return state


def test_ten_steps_are_the_references_recipe_and_the_logged_rate_is_the_one_that_was_used(
    shards: Path, tmp_path: Path
) -> None:
    """The recipe as a bare loop over the same batches: AdamW of torch, rates by the formula, nothing of Composer."""
    config = load_tiny_config("finetune", shards, tmp_path, [*RECIPE, "scheduler.t_warmup=0.03dur"])
    start = build_model(plain(config))
    trainer, seen = run(config, Rates())
    expected = [2e-3 * of_the_recipe(step, STEPS, 0.03) for step in range(STEPS)]
    assert seen.used == pytest.approx(expected, rel=1e-12) and seen.logged == seen.used
    assert expected[0] == 0 and expected[1] == 2e-3  # one step of warm-up, as 0.3 steps are rounded up

    before = {name: weight.detach().clone() for name, weight in start.named_parameters()}
    wrapped = ComposerPathMLLM(start)
    trained = [weight for weight in start.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for step, batch in enumerate(seen.batches):
        optimizer.param_groups[0]["lr"] = 2e-3 * of_the_recipe(step, STEPS, 0.03)
        optimizer.zero_grad()
        wrapped.loss(wrapped(batch), batch).backward()
        optimizer.step()
    after = weights_of(trainer)
    moved = math.sqrt(sum(float((weight - before[name]).square().sum()) for name, weight in after.items()))
    loop = dict(start.named_parameters())
    apart = math.sqrt(sum(float((weight - loop[name]).detach().square().sum()) for name, weight in after.items()))
    assert moved > 0.1 and apart < 1e-3 * moved  # measured 6.4e-8
    # Composer's own timing begins with two steps at rate 0 and ends elsewhere.
    late = load_tiny_config("finetune", shards, tmp_path / "late", [*RECIPE, "scheduler.reference_timing=false"])
    assert run(late, Rates())[1].used[:2] != seen.used[:2]


@pytest.mark.parametrize("name", ["cosine_with_warmup", "linear_with_warmup", "constant_with_warmup", "constant"])
def test_the_first_rates_of_composers_schedules_are_those_of_their_own_time(name: str) -> None:
    keywords = {} if name == "constant" else {"t_warmup": "2ba"}
    schedule = build_schedule(name, **keywords)
    shares = [schedule(state_at(step, "10ba", 10)) for step in range(3)]
    assert shares == ([1, 1, 1] if name == "constant" else [0, 0.5, 1])


@pytest.mark.parametrize(("warmup", "steps", "expected"), [("0.03dur", 7, 1), ("0.03dur", 100, 3), ("0.05dur", 21, 2)])
def test_a_warm_up_in_shares_of_the_run_is_rounded_up(warmup: str, steps: int, expected: int) -> None:
    schedule = build_schedule("cosine_with_warmup", t_warmup=warmup)
    shares = [schedule(state_at(step, "1ep", steps)) for step in range(steps)]
    assert shares == pytest.approx([of_the_recipe(step, steps, float(warmup[:4])) for step in range(steps)], abs=1e-12)
    assert shares.index(max(shares)) == expected


def test_a_run_that_is_all_warm_up_is_told_so(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = [*RECIPE, "trainer.max_duration=1ba", "scheduler.t_warmup=0.03dur"]
    run(load_tiny_config("finetune", shards, tmp_path, one))
    assert sum("is all warm-up" in record.getMessage() for record in caplog.records) == 1


def test_a_resumed_run_has_the_rates_of_an_undisturbed_one(shards: Path, tmp_path: Path) -> None:
    saving = [*RECIPE, "trainer={save_interval: 1ba, autoresume: true, max_duration: 5ba}", "scheduler.t_warmup=2ba"]
    undisturbed = run(load_tiny_config("pretrain", shards, tmp_path / "undisturbed", saving), Rates())[1].used
    stopped = Rates(stop_after=2)
    with pytest.raises(Interrupted):
        run(load_tiny_config("pretrain", shards, tmp_path / "stopped", saving), stopped)
    resumed = run(load_tiny_config("pretrain", shards, tmp_path / "stopped", saving), Rates())[1].used
    assert stopped.used + resumed == undisturbed and len(resumed) == 3
