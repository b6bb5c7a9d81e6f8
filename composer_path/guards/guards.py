"""The guards of a run: NaN, loss spikes, hanging, signals and the wall clock. They change no number."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from composer.core import Callback, Event, Precision, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from composer_path.checkpoints.saver import CheckpointSaver
from composer_path.guards.ending import NotFinite, RunStopped
from composer_path.guards.finite import StepFlags, Verdict, norm_of, not_finite
from composer_path.guards.ranks import FailureBoard
from composer_path.guards.requests import StopRequests, code_of, seconds_of, words_of
from composer_path.guards.spikes import LossSpikes
from composer_path.guards.watch import Watch

log = logging.getLogger(__name__)

_CHECKPOINTS = (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT, Event.ITERATION_CHECKPOINT)
# What the run waits for if nothing comes after an event.
_WAITS_FOR = {
    Event.BEFORE_DATALOADER: "data",
    Event.AFTER_DATALOADER: "the forward and backward pass, and other ranks in it",
    Event.AFTER_TRAIN_BATCH: "the optimizer's step, and other ranks at its end",
    Event.BATCH_END: "what follows a step",
    Event.EVAL_START: "an evaluation",
    Event.EVAL_STANDALONE_START: "the evaluation before training",
    **dict.fromkeys(_CHECKPOINTS, "a checkpoint or weights being written"),
    Event.FIT_END: "what follows the last step",
}
_SAMPLES_NAMED = 32


@dataclass
class _Step:
    """A step whose flags are on their way."""

    number: int
    flags: StepFlags
    losses: list[Tensor]  # of its microbatches
    sample_ids: list[Tensor]  # likewise


class Guards(Callback):
    """Stops a run that goes wrong on all ranks before anything is written, and one that is asked to after a checkpoint.

    As a context it looks after the whole run, its start included; as a callback, the first of all, it sees each step.
    A rank's loss and gradient norm are judged on its device, and the ranks agree by one reduction of three numbers a
    step, which also says whether one of them is asked to stop.

    Args:
        on_nan: What a loss or gradient norm that isn't finite does: stop the run, or leave that step's update out.
        skips_in_a_row: So many steps left out one after another stop the run, too.
        loss_spike: A notice if the loss is so many median absolute deviations above the median of the last 100 steps;
            None says nothing.
        stall_timeout: Seconds in which something must move (a step, a batch of an evaluation, a checkpoint), four times
            as many before the first step has ended; None waits for ever.
        stop_after: Wall-clock time of this process after which it saves and stops, such as `11.5h`, `90m`, `3600s`.
        save_on: Signals that save a checkpoint and stop, beside Ctrl-C.
        run_folder: Of the run.
    """

    def __init__(
        self,
        on_nan: Literal["stop", "skip"] = "stop",
        skips_in_a_row: int = 3,
        loss_spike: int | float | None = 10,
        stall_timeout: int | float | None = 1800,
        stop_after: str | int | float | None = None,
        save_on: Sequence[Literal["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"]] = ("SIGTERM",),
        *,
        run_folder: Path,
    ) -> None:
        self.on_nan, self.skips_in_a_row = on_nan, skips_in_a_row
        self.spikes = None if loss_spike is None else LossSpikes(loss_spike)
        self.requests = StopRequests(save_on, None if stop_after is None else seconds_of(stop_after))
        self.board = FailureBoard()
        self.watch = Watch(stall_timeout, self.requests, self.board, run_folder)
        self.skipped, self.skips = 0, 0  # in all, and in a row
        self.reason = 0  # why all ranks stop
        self._losses: list[Tensor] = []
        self._sample_ids: list[Tensor] = []
        self._steps: list[_Step] = []
        self._logged: Any = {}  # the losses of the step before
        self._weights_seen = False

    # ------------------------------------------------------------------------------------------------ around the run

    def __enter__(self) -> Guards:
        self.requests.install()
        self.watch.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.requests.settled = True
        if dist.get_world_size() > 1 and kind is not None:
            # The signals stay ours until the process ends: the launcher signals ranks that are ending already.
            if issubclass(kind, RunStopped):  # on all ranks: nobody needs to be told
                self.watch.stop()
                self.board.leave()
            return
        self.watch.stop()
        if dist.get_world_size() > 1:
            dist.barrier()  # the board lies on rank 0
        self.board.leave()
        self.requests.restore()

    # ------------------------------------------------------------------------------------------------ events

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Whatever happens shows that the run moves."""
        self.watch.mark(_WAITS_FOR.get(event, self.watch.waits_for))
        super().run_event(event, state, logger)
        if event in (Event.EVAL_STANDALONE_START, Event.FIT_START) and not self._weights_seen:
            self._weights_seen = True
            self._require_finite_weights(state, "before the first step of this start", everything=True)
        if event in (Event.EVAL_START, Event.EVAL_BATCH_END):
            self._evaluating(event, state, logger)
        if event in _CHECKPOINTS:
            self._checkpoint(event, state, logger)

    def batch_start(self, state: State, logger: Logger) -> None:
        """From here on a signal waits for the step's end."""
        self.requests.before_steps = False
        self._losses, self._sample_ids = [], []

    def after_loss(self, state: State, logger: Logger) -> None:
        """Note the loss of a microbatch."""
        losses: Any = state.loss
        if not isinstance(losses, Tensor):  # several, by name or in a row
            losses = torch.stack([part.reshape(()) for part in getattr(losses, "values", lambda: losses)()]).sum()
        self._losses.append(losses)
        self._sample_ids.append(getattr(state.batch, "sample_ids", torch.zeros(0, dtype=torch.int64)))

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Judge the step, before the optimizer takes it."""
        gradients = [p.grad for p in _trained(state) if p.grad is not None]
        if state.precision == Precision.AMP_FP16:
            gradients = []  # there infinity is part of the method: the scaler leaves the step out and scales less
        flags = StepFlags(self._losses, gradients, self.requests.reason(), _device(state))
        step = _Step(state.timestamp.batch.value + 1, flags, self._losses, self._sample_ids)
        if self.on_nan == "skip":
            self._skip_or_take(step, state, logger)
        self._steps.append(step)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Read what has come: with several ranks this step's flags, as they have waited for each other by now."""
        self.watch.first_step, self.watch.step = False, state.timestamp.batch.value
        at_once = dist.get_world_size() > 1 or not self._steps or self._steps[-1].flags.arrived()
        self._read(self._steps if at_once else self._steps[:-1], state)
        if dist.get_world_size() == 1:
            self.reason = self.reason or self.requests.reason()
        self._look_for_spikes(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        """The results are written next; what asks for a stop now comes too late to change anything."""
        self.settle(state)

    # ------------------------------------------------------------------------------------------------ NaN

    def settle(self, state: State) -> None:
        """Return only if all steps so far, and the trained weights, are finite; every rank must call it.

        Asked before anything is written.

        Raises:
            NotFinite: On all ranks.
        """
        self._read(self._steps, state)
        self._require_finite_weights(state, f"after step {state.timestamp.batch.value}")

    def _read(self, steps: Sequence[_Step], state: State) -> None:
        for step in list(steps):
            self._steps.remove(step)
            verdict = step.flags.read()
            self.reason = self.reason or verdict.reason
            if not verdict.finite and self.on_nan == "stop":
                raise NotFinite(f"{self._words(step, verdict)}; {self._what_stays(state)}")

    def _skip_or_take(self, step: _Step, state: State, logger: Logger) -> None:
        verdict = step.flags.read()
        self.skips = 0 if verdict.finite else self.skips + 1
        if not verdict.finite:
            self.skipped += 1
            words = self._words(step, verdict)
            if self.skips >= self.skips_in_a_row:
                raise NotFinite(f"{words}, the {_nth(self.skips)} such step in a row; {self._what_stays(state)}")
            if dist.get_global_rank() == 0:
                log.warning("%s; its update is left out", words)
            for optimizer in state.optimizers:
                optimizer.zero_grad(set_to_none=True)
        logger.log_metrics({"guards/skipped_steps": self.skipped})

    def _words(self, step: _Step, verdict: Verdict) -> str:
        """Which step, rank and samples; every rank must ask."""
        mine = [
            one.tolist()
            for one, loss in zip(step.sample_ids, step.losses, strict=True)
            if verdict.loss_of is None or not torch.isfinite(loss)
        ]
        of_ranks = dist.all_gather_object(sorted(chain.from_iterable(mine)))
        if verdict.loss_of is not None:
            where, ids = f"the loss of rank {verdict.loss_of}", of_ranks[verdict.loss_of]
        else:
            where, ids = f"the gradient norm of rank {verdict.gradient_of}", sorted(chain.from_iterable(of_ranks))
        more = f" and {len(ids) - _SAMPLES_NAMED} more" if len(ids) > _SAMPLES_NAMED else ""
        named = ", ".join(map(str, ids[:_SAMPLES_NAMED])) + more
        return f"step {step.number}: {where} must be finite; found NaN or infinity with samples {named}"

    def _what_stays(self, state: State) -> str:
        kept = "".join(f", checkpoints in {saver.folder} stay as they are" for saver in savers(state))
        return (
            f"nothing was written after it{kept}; lower "
            "optimizer.lr, clip gradients, look at these samples, or leave such steps out with guards.on_nan=skip"
        )

    def _require_finite_weights(self, state: State, when: str, everything: bool = False) -> None:
        named = {name: p for name, p in state.model.named_parameters() if everything or p.requires_grad}
        finite = torch.isfinite(norm_of(named.values())).to(torch.int64).to(_device(state))
        if dist.get_world_size() > 1:
            dist.all_reduce(finite, reduce_operation="MIN")
        if not finite.item():
            found = sorted(set(chain.from_iterable(dist.all_gather_object(not_finite(named)))))
            names = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
            words = f"weights must be finite; found NaN or infinity {when} in {names or 'the norm of all'}"
            fix = "check the files under model: in the YAML" if everything else self._what_stays(state)
            raise NotFinite(f"{words}; {fix}")

    # ------------------------------------------------------------------------------------------------ stopping

    def _checkpoint(self, event: Event, state: State, logger: Logger) -> None:
        """Stop here if asked to, an epoch's last step as part of its epoch; judge before others write."""
        at_epochs_end = event == Event.BATCH_CHECKPOINT and state.timestamp.batch_in_epoch == state.dataloader_len
        if self.reason and not at_epochs_end and not _ended(state):
            self._stop(state, logger)
        if any(saver.will_save(state, event) for saver in savers(state)):
            self.settle(state)

    def _evaluating(self, event: Event, state: State, logger: Logger) -> None:
        """Let no evaluation stand between a request and its checkpoint; but for the last one, of a run that is done."""
        if event == Event.EVAL_BATCH_END and not _ended(state):
            asked = torch.full((), self.requests.reason(), dtype=torch.int64, device=_device(state))
            if dist.get_world_size() > 1:
                dist.all_reduce(asked, reduce_operation="MAX")
            self.reason = self.reason or int(asked.item())
        if self.reason and not _ended(state):
            self._stop(state, logger)
        if event == Event.EVAL_START:
            self._read(self._steps, state)

    def _stop(self, state: State, logger: Logger) -> None:
        """Save, and end the run."""
        step, words = state.timestamp.batch.value, words_of(self.reason)
        self.settle(state)
        self.watch.mark("the last checkpoint being written")
        saved = step > 0 and save_checkpoint_now(state, logger)
        self.requests.settled = True
        if saved:
            [place] = {str(saver.folder) for saver in savers(state)}
            message = f"stopped by {words} at step {step}: its checkpoint is in {place}; "
            message += "the same command goes on from there (trainer.autoresume=true)"
        else:
            message = f"stopped by {words} at step {step}: nothing was saved, as trainer.save_interval is null"
        raise RunStopped(message, code_of(self.reason))

    def _look_for_spikes(self, state: State) -> None:
        """Look at the step before, whose loss has come."""
        before, self._logged = self._logged, state.total_loss_dict or {}
        loss = before.get("loss/train/total")
        if self.spikes is None or loss is None or dist.get_global_rank() != 0:
            return
        if line := self.spikes.notice(state.timestamp.batch.value - 1, float(loss)):
            log.warning("%s", line)


def savers(state: State) -> Iterator[CheckpointSaver]:
    """The run's checkpoint savers."""
    return (one for one in state.callbacks if isinstance(one, CheckpointSaver))


def save_checkpoint_now(state: State, logger: Logger) -> bool:
    """Save this step, unless it is saved; False if the run saves none. Every rank must call it."""
    found = list(savers(state))
    for saver in found:
        saver.save(state, logger)
    return bool(found)


def settle(state: State) -> None:
    """What writes weights asks first: see `Guards.settle`. Runs without guards have none to ask."""
    for one in state.callbacks:
        if isinstance(one, Guards):
            one.settle(state)


def _ended(state: State) -> bool:
    """Whether the last step is done; an evaluation before training, which has no end, is not the last."""
    return bool(state.timestamp.batch.value and state.max_duration and state.timestamp >= state.max_duration)


def _trained(state: State) -> Iterator[Any]:
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]


def _device(state: State) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if state.device.name == "gpu" else torch.device("cpu")


def _nth(number: int) -> str:
    return f"{number}{'st' if number == 1 else 'nd' if number == 2 else 'rd' if number == 3 else 'th'}"
