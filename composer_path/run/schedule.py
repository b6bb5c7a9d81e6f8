"""The learning rate of each step: Composer's schedules, read when a step begins, with warm-up rounded up.

Composer asks a schedule when a step ends, for the time at which it began: each rate holds one step longer than in
transformers' Trainer, a run with warm-up begins with two steps at rate 0, and what is logged is the next step's rate.
It rounds a warm-up's length down where that Trainer rounds up. Here both are as there, unless the YAML says otherwise.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from composer.core import State, Time, TimeUnit
from composer.optim import ComposerScheduler

from composer_path.run.names import named_classes

log = logging.getLogger(__name__)


def build_schedule(name: str, *, reference_timing: bool = True, **keywords: Any) -> ComposerScheduler:
    """The schedule that a YAML names.

    Args:
        name: Of one of Composer's classes.
        reference_timing: Step k has the rate of time k, and a warm-up in shares of the run is rounded up to whole
            steps, as in the reference (transformers' Trainer). False is Composer's own way, of runs begun with it.
        **keywords: Of the class.
    """
    cls = named_classes("scheduler")[name]
    return ReferenceTiming(cls, **keywords) if reference_timing else cls(**keywords)


class ReferenceTiming(ComposerScheduler):
    """A schedule whose rates are set before each step, by `set_rates`.

    Args:
        cls: Of the schedule, Composer's or one that is called like those.
        **keywords: Of it.
    """

    def __init__(self, cls: Callable[..., ComposerScheduler], **keywords: Any) -> None:
        self.build = partial(cls, **keywords)
        self.schedule: Any = self.build()
        self.t_warmup: str | None = getattr(self.schedule, "t_warmup", None)  # None: it knows none
        self._with: dict[Any, Any] = {}  # the same with other warm-ups

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        """Which share of an optimizer's rate holds now."""
        return self.share(state, ssr)

    def share(self, state: State, ssr: float = 1.0, t_warmup: str | None = None) -> float:
        """The same, also with another warm-up in place of the schedule's own."""
        schedule, warmup = self.schedule, t_warmup or self.t_warmup
        if warmup is not None:
            steps = self._rounded_up(warmup, state)
            if steps not in self._with:
                self._with[steps] = self.build(t_warmup=steps)
            schedule = self._with[steps]
        return float(schedule(state, ssr) if ssr != 1.0 else schedule(state))

    def _rounded_up(self, warmup: str | Time[Any], state: State) -> Time[Any]:
        """A warm-up in steps where it is a share of a run that counts in epochs or steps."""
        time = Time.from_timestring(warmup) if isinstance(warmup, str) else warmup
        whole = state.max_duration
        if time.unit != TimeUnit.DURATION or whole is None:
            return time
        if whole.unit == TimeUnit.EPOCH:
            if state.dataloader_len is None:
                raise ValueError("scheduler.t_warmup: the loader must know its length; give a number of steps (500ba)")
            whole = Time(whole.value * int(state.dataloader_len), TimeUnit.BATCH)
        rounded = Time(math.ceil(whole.value * time.value), whole.unit)
        if rounded >= whole and rounded not in self._with:
            log.warning("scheduler.t_warmup: %s of %s is all warm-up, which ends below the full rate", rounded, whole)
        return rounded


def set_rates(state: State, schedule: ReferenceTiming, ssr: float = 1.0) -> None:
    """Give each group of parameters the rate of the step that begins; a group may have a warm-up of its own."""
    shares: dict[str | None, float] = {}
    for group in (group for optimizer in state.optimizers for group in optimizer.param_groups):
        own = group.get("t_warmup")
        if own not in shares:
            shares[own] = schedule.share(state, ssr, own)
        rate = float(group["initial_lr"]) * shares[own]
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
