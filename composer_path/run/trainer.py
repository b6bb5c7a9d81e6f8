"""Composer's Trainer with less work between steps, and nothing there that waits for the device of a single rank.

Three things differ, none of them in a number: callbacks that do nothing at an event aren't called; a step's losses are
read when they have come from the device, not before; and what only the host knows (how many samples, tokens, weights)
isn't sent to the device and back to be added up over one rank. Several ranks still agree as Composer lets them. Rates
are set when a step begins, where the schedule wants it (`schedule.py`), and a second `fit` goes on amid the epoch where
the first one ended.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from typing import Any

import torch
from composer import Trainer
from composer.core import Algorithm, Callback, Engine, Event
from composer.loggers import LoggerDestination
from composer.trainer.trainer import TrainerMode
from composer.utils import dist
from torch import Tensor

from composer_path.run.late_losses import LateLosses
from composer_path.run.schedule import ReferenceTiming, set_rates


class StepTrainer(Trainer):
    """Composer's Trainer; the same numbers in the same order. What it replaces, tests pin."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        # The engine is Composer's own object, made and used in its __init__; ours differs in methods only.
        self.engine.__class__ = DirectEngine
        self._has_fitted = False
        self._schedule, self._ssr = keywords.get("schedulers"), keywords.get("scale_schedule_ratio", 1.0)
        if isinstance(self._schedule, ReferenceTiming):
            self._scheduler_step_frequency: Any = None  # Composer then asks no schedule when a step ends

    def fit(self, *arguments: Any, **keywords: Any) -> None:
        """Train on; what was trained in an earlier call isn't read again to find the place, as Composer does it.

        By iterating anew over the set, Composer would go on with the order of a later epoch.
        """
        state = self.state
        dataset: Any = state._dataset_of(state.train_dataloader)
        if self._has_fitted and hasattr(dataset, "load_state_dict"):
            dataset.load_state_dict(dataset.state_dict(state.timestamp.sample_in_epoch.value, True))
            state.dataset_resumption["train"] = True
        self._has_fitted = True
        super().fit(*arguments, **keywords)

    def _train_batch(self, use_grad_scaling: bool) -> Any:
        """A step. Its losses are logged here, so that Composer's loop, given none, doesn't wait for them.

        Loggers with a method `log_losses` read them later; for others, and for who asks `state.total_loss_dict`, they
        are read at once.
        """
        if isinstance(self._schedule, ReferenceTiming):
            set_rates(self.state, self._schedule, self._ssr)
        losses = super()._train_batch(use_grad_scaling)
        world_size = dist.get_world_size()
        for loss in losses.values() if world_size > 1 else ():
            dist.all_reduce(loss)
        late = LateLosses(losses, world_size)
        self.state.total_loss_dict = late  # type: ignore[assignment]
        step = self.state.timestamp.batch.value
        for destination in self.logger.destinations:
            if hasattr(destination, "log_losses"):
                destination.log_losses(late, step)
            else:
                destination.log_metrics(dict(late), step)
        return None

    def _use_closures(self) -> bool:
        """Closures for those optimizers only that need them: Composer's reads the loss, which nobody then uses."""
        return all(getattr(optimizer, "_step_supports_amp_closure", False) for optimizer in self.state.optimizers)

    def _train_microbatches(
        self, microbatches: Sequence[Any], total_loss_dict: dict[str, Tensor], ddp_sync: bool = True
    ) -> Tensor:
        """Forward and backward passes of a step; as Composer's, but that the batch's weight stays on the host."""
        if dist.get_world_size() > 1 or not ddp_sync:
            return super()._train_microbatches(microbatches, total_loss_dict, ddp_sync)
        state: Any = self.state
        spec: Any = self._train_data_spec
        self.engine.run_event(Event.BEFORE_TRAIN_BATCH)
        scales = self._use_grad_scaling(state.precision, state.scaler)
        for optimizer in state.optimizers:
            optimizer.zero_grad(set_to_none=True)
        weights = [spec.get_num_tokens_in_batch(part, token_type="loss_generating") for part in microbatches]
        weight = torch.tensor(sum(weights)).item()  # rounded as Composer rounds it
        whole = state.batch
        for at, part in enumerate(microbatches, start=1):
            state.batch = spec.microbatch_transforms(state.device.batch_to_device(part))
            for name, loss in self._train_microbatch(scales, weight, at == len(microbatches)).items():
                key = f"loss/train/{name}"
                if key not in total_loss_dict:
                    total_loss_dict[key] = state.device.tensor_to_device(torch.zeros(1))
                total_loss_dict[key] += loss
        state.batch = whole
        for optimizer in state.optimizers if scales else ():
            state.scaler.unscale_(optimizer)
        self.engine.run_event(Event.AFTER_TRAIN_BATCH)
        return total_loss_dict["loss/train/total"]

    def _iter_dataloader(self, trainer_mode: TrainerMode) -> Iterator[Any]:
        """The loader's batches; a single rank needn't ask others whether they have come to their end."""
        if dist.get_world_size() > 1 or trainer_mode != TrainerMode.TRAIN:
            yield from super()._iter_dataloader(trainer_mode)
            return
        length = self.state.dataloader_len
        batches = iter(self.state.dataloader) if length is None else islice(self.state.dataloader, int(length))
        while True:
            self.engine.run_event(Event.BEFORE_DATALOADER)
            try:
                batch = next(batches)
            except StopIteration:
                self.engine.run_marker_only_event(Event.AFTER_DATALOADER)
                return
            yield batch

    def _accumulate_time_across_ranks(
        self, num_samples: int | float, num_tokens: int, batch_time: datetime.timedelta
    ) -> tuple[int, int, datetime.timedelta]:
        """Samples, tokens and time of a step over all ranks."""
        if dist.get_world_size() > 1 or isinstance(num_samples, float):
            return super()._accumulate_time_across_ranks(num_samples, num_tokens, batch_time)
        return num_samples, num_tokens, batch_time


class DirectEngine(Engine):
    """An engine that calls only those callbacks that do something at an event: few of a hundred calls a step."""

    def run_event(self, event: Event | str) -> Any:
        """Algorithms first, then callbacks, then loggers."""
        event, state = Event(event), self.state
        if event is Event.INIT or self._is_closed or state.profiler is not None or os.environ.get("ENGINE_DEBUG"):
            return super().run_event(event)
        self._assert_dataloader_and_duration_set(state, event)
        traces = self._run_algorithms(event)
        kinds: list[Any] = [type(one) for one in state.callbacks]
        asked = [
            one
            for one, kind in zip(state.callbacks, kinds, strict=True)
            if answers(kind, event) or event.value in vars(one)
        ]
        for callback in sorted(asked, key=lambda one: isinstance(one, LoggerDestination)):
            callback.run_event(event, state, self.logger)
        return traces

    def _compile(self, algorithms_to_run: Sequence[Algorithm], event: Event) -> Sequence[Algorithm]:
        return super()._compile(algorithms_to_run, event) if algorithms_to_run else algorithms_to_run


@cache
def answers(kind: Any, event: Event) -> bool:
    """Whether a class of callbacks does something at an event; what Composer's own base class has does nothing."""
    names = ("run_event", event.value)
    return any(getattr(kind, name) is not getattr(Callback, name) for name in names)
