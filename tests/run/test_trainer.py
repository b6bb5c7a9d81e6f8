"""Composer's Trainer with less work between steps: the same numbers in the same order."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any

import composer.loggers
import pytest
import torch
from composer import Trainer
from composer.callbacks import SpeedMonitor
from composer.core import Callback, DataSpec, Engine, Event, State
from composer.devices import DeviceCPU
from composer.loggers import InMemoryLogger, Logger
from composer.models import ComposerModel
from torch.utils.data import DataLoader

from composer_path.run.trainer import DirectEngine, StepTrainer

# As of mosaicml 0.32.1: what ours replace, and what they count on around it. When one differs, compare it with ours in
# run/trainer.py, callbacks/speed_report.py and callbacks/tensorboard.py, and write the new number here.
ORIGINALS = {
    (Trainer, "_train_loop"): "1dffbf6b9c51bcaa",
    (Trainer, "_train_batch"): "787aff3a7f538299",
    (Trainer, "_use_closures"): "f8e8d08988ae6669",
    (Trainer, "_train_microbatches"): "3ee43a3fb726d98f",
    (Trainer, "_iter_dataloader"): "970ae649c7dcbe0a",
    (Trainer, "_accumulate_time_across_ranks"): "a7a8ddb3e21b06c7",
    (Engine, "run_event"): "7a6db86fd36677a9",
    (Engine, "_run_callbacks"): "041f89c2886d307e",
    (Engine, "_run_nonlogger_callbacks"): "87d978492cad01b3",
    (Engine, "_run_loggers"): "4ac13232cb087eff",
    (Engine, "_compile"): "7fb43791daab05b4",
    (Callback, "run_event"): "bb713e6da48fc530",
    (SpeedMonitor, "batch_end"): "b3654794acea0e6d",
    (composer.loggers.TensorboardLogger, "log_metrics"): "32762bbeaa29c784",
    (composer.loggers.TensorboardLogger, "_flush"): "6de86e1d65ed3583",
}


@pytest.mark.parametrize(("owner", "name"), ORIGINALS, ids=[f"{owner.__name__}.{name}" for owner, name in ORIGINALS])
def test_what_is_replaced_of_composer_is_what_it_was_written_after(owner: Any, name: str) -> None:
    source = inspect.getsource(getattr(owner, name)).encode()
    assert hashlib.sha256(source).hexdigest()[:16] == ORIGINALS[owner, name]


# ------------------------------------------------------------------------------------------------ the same run


class Squares(ComposerModel):
    """A line through numbers, with two losses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch)

    def loss(self, outputs: torch.Tensor, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = {"square": (outputs - batch.sum(1, keepdim=True)).square().mean(), "size": outputs.abs().mean()}
        return parts | {"total": parts["square"] + 0.1 * parts["size"]}


class Calls(InMemoryLogger):
    """Notes what is logged, call by call, and the losses that callbacks see."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.calls.append((step, {name: float(value) for name, value in metrics.items()}))

    def batch_end(self, state: State, logger: Logger) -> None:
        self.calls.append(("seen", dict(state.total_loss_dict)))


def run(kind: type[Trainer], device: Any = "cpu") -> tuple[list[Any], Squares, State]:
    """An epoch of three batches and two steps of the next, each in two microbatches of different weight."""
    torch.manual_seed(0)
    model, calls = Squares(), Calls()
    data = torch.randn(11, 2)
    spec = DataSpec(
        DataLoader(data, batch_size=4),  # type: ignore[arg-type]
        get_num_samples_in_batch=len,
        get_num_tokens_in_batch=lambda batch: {"total": 2 * len(batch), "loss_generating": 0.3 + len(batch)},
        split_batch=lambda batch, size: [batch[:1], batch[1:]],
    )
    trainer = kind(
        model=model,
        train_dataloader=spec,
        optimizers=torch.optim.AdamW(model.parameters(), lr=0.1),
        max_duration="5ba",
        device=device,
        loggers=[calls],
        device_train_microbatch_size=4,
        accumulate_train_batch_on_tokens=True,
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return calls.calls, model, trainer.state


def test_losses_logs_times_and_weights_are_those_of_composers_trainer() -> None:
    expected, model, state = run(Trainer)
    calls, own_model, own_state = run(StepTrainer)
    assert calls == expected and len(calls) > 20
    assert {name for _, metrics in calls for name in metrics} >= {"loss/train/total", "loss/train/square", "time/token"}
    for name, value in model.state_dict().items():
        assert torch.equal(own_model.state_dict()[name], value), name
    for unit in ("epoch", "batch", "sample", "token", "batch_in_epoch"):
        assert getattr(own_state.timestamp, unit) == getattr(state.timestamp, unit)
    assert own_state.timestamp.sample.value == 19 and own_state.timestamp.total_wct.total_seconds() > 0


def test_only_optimizers_that_need_a_closure_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Composer's closure reads the loss; SAM's optimizer, which runs the passes twice, says that it needs one."""
    found: list[Any] = []
    step = torch.optim.AdamW.step

    def note(self: Any, closure: Any = None) -> Any:
        found.append(closure)
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    plain, _, _ = run(StepTrainer)
    assert found == [None] * 5
    monkeypatch.setattr(torch.optim.AdamW, "_step_supports_amp_closure", True, raising=False)
    closed, _, _ = run(StepTrainer)
    assert len(found) == 10 and None not in found[5:]
    assert closed == plain


# ------------------------------------------------------------------------------------------------ events


class Asked(Callback):
    """Does something at one event."""

    def __init__(self, notes: list[str], name: str) -> None:
        self.notes, self.name = notes, name

    def batch_end(self, state: State, logger: Logger) -> None:
        self.notes.append(f"{self.name} batch_end")


class AskedOfAll(Asked):
    """Does something at all events."""

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        self.notes.append(f"{self.name} {event.value}")


class AskedLogger(InMemoryLogger):
    """A logger, which comes after the callbacks."""

    notes: list[str]

    def batch_end(self, state: State, logger: Logger) -> None:
        self.notes.append("logger batch_end")


def called(kind: type[Engine], events: Sequence[Event]) -> list[str]:
    """Who was called, in which order."""
    notes: list[str] = []
    first = AskedLogger()
    first.notes = notes
    late = Asked(notes, "by hand")
    late.batch_start = lambda state, logger: notes.append("by hand batch_start")  # type: ignore[method-assign]
    callbacks = [first, Asked(notes, "one"), AskedOfAll(notes, "all"), late]
    state = State(Squares(), 0, "a_run", DeviceCPU(), max_duration="1ba", callbacks=callbacks)
    state.set_dataloader([0], "train")
    engine = Engine(state, Logger(state))
    engine.__class__ = kind
    for event in events:
        engine.run_event(event)
    engine.close()
    return notes


def test_callbacks_are_called_as_composers_engine_calls_them() -> None:
    events = [Event.FIT_START, Event.BATCH_START, Event.BEFORE_LOSS, Event.BATCH_END]
    found = called(DirectEngine, events)
    assert found == called(Engine, events)
    assert found.count("one batch_end") == 1 and "by hand batch_start" in found and "all before_loss" in found
    assert found[-1] == "logger batch_end"


def test_a_callback_that_does_nothing_at_an_event_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Event] = []
    monkeypatch.setattr(Callback, "run_event", lambda self, event, state, logger: asked.append(event))
    state = State(Squares(), 0, "a_run", DeviceCPU(), max_duration="1ba", callbacks=[Asked([], "one")])
    state.set_dataloader([0], "train")
    engine = Engine(state, Logger(state))
    engine.__class__ = DirectEngine
    for event in (Event.BATCH_START, Event.BATCH_END, Event.EPOCH_END):
        engine.run_event(event)
    assert asked == [Event.BATCH_END]
