"""An exponential moving average of the weights, with which a model is evaluated and exported.

Composer's own takes the place of a checkpoint's weights, and mixes whole and sharded weights under FSDP2. Here each
rank averages its shards; training never sees the averages. A checkpoint holds both: the weights that training goes on
with, and the averages, which every export takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from composer.core import Algorithm, Event, State, Time, TimeUnit
from composer.loggers import Logger
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

AVERAGES = "state.algorithms.EMA.averages."  # before a weight's name, in a checkpoint


class EMA(Algorithm):
    """Keeps the average of all trained weights: `average = smoothing * average + (1 - smoothing) * weight`.

    Runs at a step's or epoch's end. It costs a copy of the trained weights (sharded as they are) and one pass over it.
    Evaluations and `save_weights` use the averages, `composer-path export` takes them from a checkpoint. A resumed run
    goes on exactly; one without `ema` before takes the weights that it goes on from as its first averages.

    Args:
        half_life: After how long a weight counts half, in `ba` or `ep`; null if `smoothing` is given.
        smoothing: The factor itself, above 0 and below 1, whatever the interval.
        ema_start: Until then, averages are the weights.
        update_interval: How often; 1 of half_life's unit, or 1ba.
    """

    def __init__(
        self,
        half_life: str | None = "1000ba",
        smoothing: float | None = None,
        ema_start: str = "0.0dur",
        update_interval: str | None = None,
    ) -> None:
        self.smoothing, self.start, self.interval = check_average(half_life, smoothing, ema_start, update_interval)
        self.started = False
        self.shown = False  # whether the model has the averages now, and `averages` its weights
        self.model: nn.Module | None = None
        self.weights: dict[str, nn.Parameter] = {}
        self.averages: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        return f"EMA(smoothing={self.smoothing}, start={self.start}, interval={self.interval})"

    def match(self, event: Event, state: State) -> bool:
        """Run where weights are there, change, or are evaluated."""
        return event in (Event.BEFORE_LOAD, Event.BATCH_START, Event.EVAL_START, Event.EVAL_END, self._update_event)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Begin; update; show the averages while evaluating."""
        if event == Event.BEFORE_LOAD:  # sharded by now
            self._begin(state)
        elif event == self._update_event:
            self._update(state)
        elif event == Event.EVAL_START and self.started:
            self._show(averages=True)
        else:
            self.show_trained_weights()

    def show_trained_weights(self) -> None:
        """Give the model its own weights back: whoever writes a checkpoint, also amid an evaluation, asks for it."""
        self._show(averages=False)

    @property
    def _update_event(self) -> Event:
        return Event.BATCH_END if self.interval.unit == TimeUnit.BATCH else Event.EPOCH_END

    def _begin(self, state: State) -> None:
        held = {id(p) for optimizer in state.optimizers for group in optimizer.param_groups for p in group["params"]}
        self.model = state.model
        self.weights = {_name(name): p for name, p in state.model.named_parameters() if id(p) in held}
        self.averages = {name: weight.detach().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def _update(self, state: State) -> None:
        now: Any = state.get_elapsed_duration()
        if self.start.unit != TimeUnit.DURATION:
            now = state.timestamp.get(self.start.unit)
        if not self.started:
            if now is None or now < self.start:
                return
            self._restart()
        if state.timestamp.get(self.interval.unit).value % self.interval.value == 0:
            for name, average in self.averages.items():
                _local(average).mul_(self.smoothing).add_(_local(self.weights[name]), alpha=1 - self.smoothing)

    @torch.no_grad()
    def _restart(self) -> None:
        self.started = True
        self._copy_weights()

    @torch.no_grad()
    def _copy_weights(self) -> None:
        for name, average in self.averages.items():
            _local(average).copy_(_local(self.weights[name]))

    @torch.no_grad()
    def _show(self, averages: bool) -> None:
        """Exchange, in place, the model's weights and the averages."""
        if averages == self.shown:
            return
        for name, weight in self.weights.items():
            ours, theirs = _local(self.averages[name]), _local(weight)
            kept = theirs.clone()
            theirs.copy_(ours)
            ours.copy_(kept)
        self.shown = averages
        for module in self.model.modules() if self.model is not None else ():
            if isinstance(module, FSDPModule):
                module.reshard()  # or the next forward pass would still use what was gathered before

    def state_dict(self) -> dict[str, Any]:
        """The averages. Before the start they are the weights, so that they can always be exported."""
        self.show_trained_weights()
        if not self.started:
            self._copy_weights()
        return {"started": self.started, "averages": self.averages}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the averages up; where the checkpoint has none, those of its weights are begun with."""
        self.started = state.get("started", False)
        for name, average in state.get("averages", {}).items():
            self.averages[name].copy_(average)


@contextmanager
def averaged_weights(state: State) -> Iterator[None]:
    """Within it, the model has the averages of its weights, where the run keeps them and they have begun."""
    averages = [one for one in state.algorithms if isinstance(one, EMA) and one.started]
    for one in averages:
        one._show(averages=True)
    try:
        yield
    finally:
        for one in averages:
            one.show_trained_weights()


def check_average(
    half_life: str | None, smoothing: float | None, ema_start: str, update_interval: str | None
) -> tuple[float, Time, Time]:
    """The smoothing factor, the start and the interval.

    Raises:
        ValueError: Both or neither of half-life and smoothing, or a unit that none of them has.
    """
    if (half_life is None) == (smoothing is None):
        found = "neither half_life nor smoothing" if half_life is None else "both half_life and smoothing"
        raise ValueError(f"found {found}; give one, and null for the other")
    if smoothing is not None and not 0 < smoothing < 1:
        raise ValueError(f"smoothing: found {smoothing}; it must be above 0 and below 1")
    start = Time.from_timestring(ema_start)
    if start.unit not in (TimeUnit.BATCH, TimeUnit.EPOCH, TimeUnit.DURATION):
        raise ValueError(f"ema_start: found {ema_start}; it must be in ba, ep or dur")
    half = None if half_life is None else Time.from_timestring(half_life)
    interval = Time(1, half.unit if half else TimeUnit.BATCH)
    if update_interval is not None:
        interval = Time.from_timestring(update_interval)
    if interval.unit not in (TimeUnit.BATCH, TimeUnit.EPOCH) or (half and half.unit != interval.unit):
        found = f"found a half_life of {half_life} and an update_interval of {interval.to_timestring()}"
        raise ValueError(f"{found}; both must be in ba, or both in ep")
    if interval.value < 1 or (half and half.value < 1):
        raise ValueError("found a half_life or an update_interval of nothing; both must be above 0")
    if smoothing is None:
        assert half is not None
        smoothing = float(2 ** -(interval.value / half.value))
    return smoothing, start, interval


def _name(name: str) -> str:
    """A parameter's name in `PathMLLM`, without what DDP and Composer's model put before it."""
    return name.removeprefix("module.").removeprefix("model.")


def _local(tensor: Any) -> Tensor:
    """This rank's part of a tensor, or all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()
