"""What this project takes for granted of Composer's Trainer: a bare one, without our code, says at once where it broke.

docs/seam.md says where each of these is used.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from bare_trainer import BATCH, NUM_SAMPLES, Bare, Doubled, Losses, Notes, Row, Rows, collate, rows, trainer_of
from composer import Trainer
from composer.algorithms import GradientClipping
from composer.core import Callback, Evaluator, Event, State, Time, TimeUnit
from composer.loggers import Logger
from composer.optim import ComposerScheduler, CosineAnnealingWithWarmupScheduler
from composer.utils import create_interval_scheduler, dist, get_device


@dataclass
class Run:
    trainer: Trainer
    model: Bare
    notes: Notes
    losses: Losses
    splits: list[Any]


@pytest.fixture(scope="module")
def run() -> Run:
    """Two epochs of three steps, each step cut after its first sample, with an evaluation each epoch."""
    notes, losses, splits, model = Notes(), Losses(), [], Bare()
    held_out = Evaluator(label="heldout", dataloader=rows([]), device_eval_microbatch_size=BATCH)
    trainer = trainer_of(
        rows([1], splits),
        model=model,
        eval_dataloader=[held_out],
        eval_interval="1ep",
        callbacks=[notes],
        loggers=[losses],
        schedulers=CosineAnnealingWithWarmupScheduler(t_warmup="0.5dur", alpha_f=0.0),
        optimizers=torch.optim.AdamW(
            [
                {"params": model.model[0].parameters(), "lr": 0.2, "name": "first"},
                {"params": model.model[1].parameters(), "lr": 0.1, "name": "second"},
            ]
        ),
    )
    trainer.eval()
    trainer.fit()
    trainer.close()
    return Run(trainer, model, notes, losses, splits)


# --- events and time -------------------------------------------------------------------------------------------------


def test_events_of_a_step_come_in_the_known_order(run: Run) -> None:
    events = [event for event in run.notes.events if not event.startswith(("eval_", "iteration_"))]
    each = ["before_forward", "after_forward", "before_loss", "after_loss", "before_backward", "after_backward"]
    step = ["before_dataloader", "after_dataloader", "batch_start", "before_train_batch", *each, *each]
    step += ["after_train_batch", "batch_end", "batch_checkpoint"]
    epoch = ["epoch_start", *step * 3, "before_dataloader", "epoch_end", "epoch_checkpoint"]
    start = events.index("fit_start")
    assert set(events[:start]) <= {"init", "before_load", "after_load"}
    assert events[start:] == ["fit_start", *epoch, *epoch, "fit_end"]


def test_time_counts_a_step_before_its_end_and_an_epochs_samples_are_0_at_its_end(run: Run) -> None:
    times: dict[str, list[tuple[int, ...]]] = {}
    for event, *counts in run.notes.times:
        times.setdefault(event, []).append(tuple(counts))
    # batch, sample, token, epoch, sample_in_epoch
    assert times["batch_start"][:3] == [(0, 0, 0, 0, 0), (1, 4, 28, 0, 4), (2, 8, 56, 0, 8)]
    assert times["batch_end"][:3] == [(1, 4, 28, 0, 4), (2, 8, 56, 0, 8), (3, 10, 70, 0, 10)]
    assert times["epoch_end"] == times["epoch_checkpoint"] == [(3, 10, 70, 1, 0), (6, 20, 140, 2, 0)]
    state = run.trainer.state
    assert state.timestamp >= state.max_duration and state.timestamp.total_wct.total_seconds() > 0
    assert state.run_name and state.max_duration == Time(2, TimeUnit.EPOCH) and state.device.name == "cpu"


def test_a_step_has_its_whole_batch_and_a_forward_pass_its_microbatch(run: Run) -> None:
    assert run.notes.batches["batch_start"] == run.notes.batches["batch_end"] == [4, 4, 2] * 2
    assert run.notes.batches["before_forward"] == run.notes.batches["after_loss"] == [1, 3, 1, 3, 1, 1] * 2
    assert run.splits == [(4, BATCH), (4, BATCH), (2, BATCH)] * 2


def test_a_batch_of_an_unknown_type_is_not_touched() -> None:
    batch = Row(torch.ones(2, 2), torch.ones(2))
    assert get_device("cpu").batch_to_device(batch) is batch


def test_what_an_algorithm_puts_in_a_microbatchs_place_is_computed_and_only_there() -> None:
    plain, doubled = Notes(), Notes()
    trainers = [trainer_of(rows([1]), callbacks=[plain], max_duration="1ba")]
    trainers.append(trainer_of(rows([1]), callbacks=[doubled], algorithms=[Doubled()], max_duration="1ba"))
    for trainer in trainers:
        trainer.fit()
        trainer.close()
    name = "model.0.weight"
    assert not torch.equal(plain.gradients[0][name], doubled.gradients[0][name])
    assert trainers[1].state.batch.x.tolist() == trainers[0].state.batch.x.tolist()


def test_a_logger_has_a_steps_loss_when_the_step_ends(run: Run) -> None:
    assert len(run.losses.at_batch_end) == 6
    assert len({logged["loss/train/total"] for logged in run.losses.at_batch_end}) == 6


@pytest.mark.parametrize(("interval", "expected"), [("2ba", [2, 4, 6]), ("1ep", [3, 6]), ("4ba", [4, 6])])
def test_an_interval_is_due_at_its_multiples_and_at_the_end(interval: str, expected: list[int]) -> None:
    due, found = create_interval_scheduler(interval, include_end_of_training=True), []

    class Ask(Callback):
        def run_event(self, event: Event, state: State, logger: Logger) -> None:
            asked = event in (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT)
            if asked and due(state, event):
                found.append(state.timestamp.batch.value)

    trainer = trainer_of(rows([]), callbacks=[Ask()])
    trainer.fit()
    trainer.close()
    assert sorted(set(found)) == expected


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[], [1], [1, 2, 3]])
def test_microbatches_are_weighted_by_what_generates_loss(cuts: list[int]) -> None:
    """Sample 0 weighs nothing: a microbatch of it alone has loss 0 and no share."""
    notes, losses, model = Notes(), Losses(), Bare()
    batch = collate([Rows()[index] for index in range(BATCH)])
    expected = (model(batch) * batch.weights).sum() / batch.weights.sum()
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    trainer = trainer_of(rows(cuts), model=model, callbacks=[notes], loggers=[losses], max_duration="1ba")
    trainer.fit()
    trainer.close()
    assert losses.latest["loss/train/total"] == pytest.approx(expected.item(), rel=1e-6)
    for found, wanted in zip(notes.gradients[0].values(), gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_each_groups_rate_is_set_from_the_time_before_its_step_ended(run: Run) -> None:
    factors = [0, 0, 1 / 3, 2 / 3, 1, 0.75]  # warm-up over three of six steps, then a cosine; the first holds twice
    for (first, second), factor in zip(run.notes.rates, factors, strict=True):
        assert first == pytest.approx(0.2 * factor, abs=1e-6) and second == pytest.approx(0.1 * factor, abs=1e-6)


def test_gradients_are_clipped_to_the_norm_of_all_before_the_step() -> None:
    model = Bare()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    clipping = GradientClipping(clipping_type="norm", clipping_threshold=1e-3)
    trainer = trainer_of(rows([]), model=model, optimizers=sgd, algorithms=[clipping], max_duration="1ba")
    trainer.fit()
    trainer.close()
    moved = torch.cat([(new - old).flatten() for new, old in zip(model.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_an_evaluation_starts_its_metric_anew_and_ends_in_an_event(run: Run) -> None:
    events = run.notes.events
    assert events.count("eval_end") == 3 and events.count("eval_standalone_end") == 1
    assert events.index("eval_standalone_end") < events.index("fit_start")
    assert list(run.trainer.state.eval_metrics) == ["heldout"]
    metric = run.trainer.state.eval_metrics["heldout"]["square"]
    model, batch = run.model.eval(), collate([Rows()[index] for index in range(NUM_SAMPLES)])
    assert metric.compute().item() == pytest.approx(model(batch).mean().item(), rel=1e-5)


def test_without_metrics_for_training_each_microbatch_has_one_forward_pass(run: Run) -> None:
    assert [size for training, size in run.model.forwards if training] == [1, 3, 1, 3, 1, 1] * 2


def test_a_cpu_takes_fp32_only() -> None:
    with pytest.raises(ValueError, match="not supported for CPU"):
        trainer_of(rows([]), precision="amp_bf16")


# --- names -----------------------------------------------------------------------------------------------------------


def test_the_trainer_has_the_keywords_that_this_project_names() -> None:
    known = set(inspect.signature(Trainer.__init__).parameters)
    ours = "model train_dataloader eval_dataloader optimizers schedulers algorithms callbacks loggers seed device "
    ours += "parallelism_config accumulate_train_batch_on_tokens device_train_microbatch_size precision run_name "
    ours += (
        "max_duration eval_interval save_folder save_interval save_num_checkpoints_to_keep save_overwrite autoresume "
    )
    ours += "load_path load_weights_only progress_bar log_to_console dist_timeout step_schedulers_every_batch"
    assert set(ours.split()) <= known


def test_one_process_is_a_world_of_its_own() -> None:
    dist.initialize_dist(get_device("cpu"), 300.0)
    assert (dist.get_world_size(), dist.get_global_rank(), dist.get_local_rank()) == (1, 0, 0)
    assert dist.all_gather_object("mine") == ["mine"]
    largest = torch.tensor([2.0])
    dist.all_reduce(largest, reduce_operation="MAX")
    dist.barrier()
    assert largest.item() == 2.0 and torch.distributed.get_backend() == "gloo"


def test_times_have_units_and_a_bare_number_counts_what_is_asked() -> None:
    assert Time.from_input(3, "ep") == Time(3, TimeUnit.EPOCH)
    assert Time.from_input("0.03dur", "ep").unit.value == "dur"
    assert {unit.value for unit in TimeUnit} >= {"ep", "ba", "sp", "tok", "dur", "sec"}
    assert issubclass(CosineAnnealingWithWarmupScheduler, ComposerScheduler)
