"""Loss spikes."""

from __future__ import annotations

import random

from composer_path.guards.spikes import LossSpikes


def notices(losses: list[float], deviations: float = 10.0) -> list[int]:
    """Steps for which a line comes."""
    spikes = LossSpikes(deviations)
    return [step for step, loss in enumerate(losses, start=1) if spikes.notice(step, loss)]


def falling(steps: int, noise: float = 0.05) -> list[float]:
    """A loss that falls as training losses do, with noise."""
    dice = random.Random(1)
    return [2.0 + 8.0 / (1 + step / 30) + dice.gauss(0, noise) for step in range(steps)]


def test_a_loss_far_above_those_before_it_is_noticed_once() -> None:
    losses = falling(300)
    losses[200:205] = [9.0, 9.5, 9.0, 8.0, 7.0]
    assert notices(losses) == [201]


def test_a_run_that_learns_is_quiet() -> None:
    assert notices(falling(500)) == []
    assert notices([1.0] * 100 + [1.05]) == []  # no noise at all, and a twentieth more


def test_two_spikes_far_apart_are_two_notices_that_name_step_loss_and_median() -> None:
    losses = falling(300)
    losses[100] = losses[250] = 30.0
    assert notices(losses) == [101, 251]
    spikes = LossSpikes(10.0)
    lines = [spikes.notice(step, loss) for step, loss in enumerate([1.0, 1.1] * 20 + [5.0], start=1)]
    assert lines[:-1] == [None] * 40
    assert lines[-1] == "step 41: loss spike: 5.0000, 79 deviations above the median 1.0500 of recent steps"


def test_the_first_steps_are_no_spikes() -> None:
    assert notices([1.0] * 10 + [50.0]) == []
