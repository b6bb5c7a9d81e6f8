"""Runs of one rank that go wrong, or are asked to stop, as a user sees them: exit code, message, what is left."""

from __future__ import annotations

import json
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_run import BARE, Outcome, go
from safetensors.torch import load_file
from tiny_run import load_tiny_config, run, weights_of

from composer_path import train as train_module
from composer_path.guards.ending import INTERRUPTED, MISTAKE, NOT_FINITE, STALLED, STOPPED, NotFinite
from composer_path.guards.guards import Guards
from composer_path.guards.spikes import LossSpikes

WRITES = ["callbacks={save_weights: {interval: 1ba}}", "trainer.save_interval=1ba"]


def last_line(outcome: Outcome) -> str:
    return outcome.stderr.strip().splitlines()[-1]


def steps_saved(outcome: Outcome) -> list[str]:
    return sorted(path.name for path in (outcome.folder / "checkpoints").glob("ep*"))


def left_by(outcome: Outcome) -> list[int]:
    """Processes of a run that are still there some seconds after its end: they write where it wrote."""
    for _ in range(30):
        found = []
        for stream in Path("/proc").glob("[0-9]*/fd/2"):
            with suppress(OSError):
                if stream.readlink().parent == outcome.folder.parent:
                    found.append(int(stream.parts[2]))
        if not found:
            break
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return go(tmp_path_factory.mktemp("undisturbed"), shards).losses


# ------------------------------------------------------------------------------------------------ NaN


@pytest.mark.parametrize(("fault", "what"), [("nan_loss", "the loss"), ("nan_gradient", "the gradient norm")])
def test_nan_stops_the_run_before_anything_of_its_step_is_written(
    fault: str, what: str, shards: Path, tmp_path: Path
) -> None:
    outcome = go(tmp_path, shards, WRITES, fault=fault, step=2)
    assert outcome.code == NOT_FINITE
    assert f"step 2: {what} of rank 0 must be finite; found NaN or infinity with samples " in last_line(outcome)
    assert steps_saved(outcome) == ["ep0-ba1"] and "Traceback" not in outcome.stderr
    written = load_file(outcome.folder / "model" / "model.safetensors")
    assert all(value.isfinite().all() for value in written.values())
    assert not (outcome.folder / "summary.json").exists()


def test_weights_that_turned_nan_are_not_written_though_loss_and_gradient_were_finite(
    shards: Path, tmp_path: Path
) -> None:
    outcome = go(tmp_path, shards, WRITES, fault="nan_weight", step=2)
    assert outcome.code == NOT_FINITE and steps_saved(outcome) == ["ep0-ba1"]
    assert "weights must be finite; found NaN or infinity after step 2 in model.projector." in last_line(outcome)


def test_weights_with_one_nan_are_refused_before_the_first_step(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = train_module.build_model

    def broken(settings: Any, vocabulary: Any = None) -> Any:
        model = build(settings, vocabulary)
        with torch.no_grad():
            next(model.projector.parameters()).view(-1)[3] = torch.nan
        return model

    monkeypatch.setattr(train_module, "build_model", broken)
    with pytest.raises(NotFinite, match=r"before the first step of this start in model\.projector\..*under model:"):
        run(load_tiny_config("finetune", shards, tmp_path, BARE))


def test_skipped_steps_leave_weights_as_they_were_and_are_counted(shards: Path, tmp_path: Path) -> None:
    outcome = go(tmp_path, shards, ["guards.on_nan=skip"], fault="nan_loss", step=3)
    assert outcome.code == 0
    assert "step 3: the loss of rank 0 must be finite" in outcome.stderr and "its update is left out" in outcome.stderr
    assert json.loads((outcome.folder / "summary.json").read_text())["skipped_steps"] == 1
    finite = [step for step, loss in outcome.losses.items() if loss == loss]
    assert finite == ["1", "2", "4", "5", "6"]


def test_so_many_skips_in_a_row_stop_the_run(shards: Path, tmp_path: Path) -> None:
    outcome = go(
        tmp_path,
        shards,
        ["optimizer.lr=1.0e+30", "guards={on_nan: skip, skips_in_a_row: 2}", "scheduler.t_warmup=0dur"],
    )
    assert outcome.code == NOT_FINITE and "the 2nd such step in a row" in last_line(outcome)


# ------------------------------------------------------------------------------------------------ the same run


def test_guards_change_no_number(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, guarded = run(load_tiny_config("finetune", shards, tmp_path / "a", BARE))
    with monkeypatch.context() as patch:
        patch.setattr(Guards, "run_event", lambda self, event, state, logger: None)
        other, bare = run(load_tiny_config("finetune", shards, tmp_path / "b", BARE))
    assert guarded.losses == bare.losses and len(bare.losses) == 6
    expected = weights_of(other)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(trainer).items())


def test_every_loss_is_looked_at_for_spikes_and_what_is_found_is_logged(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: dict[int, float] = {}

    def notice(self: LossSpikes, step: int, loss: float) -> str | None:
        seen[step] = loss
        return "a loss spike" if step == 3 else None

    monkeypatch.setattr(LossSpikes, "notice", notice)
    _, witness = run(load_tiny_config("finetune", shards, tmp_path, BARE))
    assert seen == {step + 1: loss for step, loss in witness.losses.items() if step < 5}  # the last has none after it
    assert [record.message for record in caplog.records if "spike" in record.message] == ["a loss spike"]


# ------------------------------------------------------------------------------------------------ stopping


@pytest.mark.parametrize(
    ("number", "overrides", "code"),
    [
        (signal.SIGTERM, [], STOPPED),
        (signal.SIGUSR1, ["guards.save_on=[SIGUSR1]"], STOPPED),
        (signal.SIGINT, ["train_loader.num_workers=2"], INTERRUPTED),
        (signal.SIGTERM, ["train_loader.num_workers=2"], STOPPED),
    ],
)
def test_a_signal_finishes_the_step_saves_it_and_the_same_command_goes_on_as_if_nothing_had_been(
    number: int, overrides: list[str], code: int, shards: Path, tmp_path: Path, undisturbed: dict[str, float]
) -> None:
    words = [*overrides, "trainer.save_interval=100ba"]
    outcome = go(tmp_path, shards, words, slow=0.3, signals=[("batch_start-0-2", number, "group")])
    assert outcome.code == code and steps_saved(outcome) == ["ep0-ba2"]
    assert f"stopped by {signal.Signals(number).name} at step 2: its checkpoint is in " in last_line(outcome)
    assert "Traceback" not in outcome.stderr and not (outcome.folder / "summary.json").exists()
    resumed = go(tmp_path, shards, words)
    assert resumed.code == 0 and resumed.losses == undisturbed and "step 1/6" not in resumed.stderr


def test_at_an_epochs_last_step_it_stops_with_the_epoch(
    shards: Path, tmp_path: Path, undisturbed: dict[str, float]
) -> None:
    outcome = go(tmp_path, shards, slow=0.3, signals=[("batch_start-0-3", signal.SIGTERM, "leader")])
    assert outcome.code == STOPPED and steps_saved(outcome) == ["ep1-ba3"]
    assert go(tmp_path, shards).losses == undisturbed


def test_a_second_signal_ends_the_process_at_once(shards: Path, tmp_path: Path) -> None:
    signals = [("batch_start-0-2", signal.SIGTERM, "leader"), ("+1.2", signal.SIGTERM, "leader")]
    outcome = go(tmp_path, shards, slow=20.0, signals=signals, slow_from=2)
    assert outcome.code == 128 + signal.SIGTERM and outcome.seconds < 3 and steps_saved(outcome) == []
    assert "SIGTERM again: ended at once, without a checkpoint of this step" in outcome.stderr


def test_the_last_step_ends_the_run_and_not_the_signal(shards: Path, tmp_path: Path) -> None:
    outcome = go(tmp_path, shards, slow=0.3, signals=[("batch_start-0-6", signal.SIGTERM, "leader")])
    assert outcome.code == 0 and (outcome.folder / "summary.json").exists()


def test_an_evaluation_does_not_stand_between_a_signal_and_its_checkpoint(
    shards: Path, tmp_path: Path, undisturbed: dict[str, float]
) -> None:
    heldout = [
        f"eval_loader={{dataset: {{local: {shards}/heldout, max_seq_len: 320, template: llava_llama_2}}, "
        "global_batch_size: 1, num_workers: 0}",
        "trainer.eval_interval=2ba",
    ]
    signals = [("eval_batch_start-0-3", signal.SIGTERM, "leader")]  # two steps are done
    outcome = go(tmp_path, shards, heldout, slow=0.5, signals=signals)
    assert outcome.code == STOPPED and steps_saved(outcome) == ["ep0-ba2"] and outcome.seconds < 3
    assert go(tmp_path, shards, heldout).losses == undisturbed


def test_the_wall_clock_stops_the_run_likewise(shards: Path, tmp_path: Path) -> None:
    outcome = go(tmp_path, shards, ["guards.stop_after=4s"], slow=1.5)
    assert outcome.code == STOPPED and len(steps_saved(outcome)) == 1
    assert "stopped by guards.stop_after at step " in last_line(outcome)


def test_a_run_that_saves_nothing_says_so(shards: Path, tmp_path: Path) -> None:
    words = ["trainer.save_interval=null", "trainer.autoresume=false"]
    outcome = go(tmp_path, shards, words, slow=0.3, signals=[("batch_start-0-2", signal.SIGINT, "leader")])
    assert outcome.code == INTERRUPTED
    assert "at step 2: nothing was saved, as trainer.save_interval is null" in last_line(outcome)


# ------------------------------------------------------------------------------------------------ hanging, mistakes


@pytest.mark.parametrize(("event", "waits_for"), [("hang", "the forward and backward pass"), ("frozen_worker", "data")])
def test_a_run_in_which_nothing_moves_is_ended_with_the_place_where_it_waits(
    event: str, waits_for: str, shards: Path, tmp_path: Path
) -> None:
    words = ["guards.stall_timeout=3", "train_loader={num_workers: 1, timeout: 0, prefetch_factor: 1}"]
    outcome = go(tmp_path, shards, words, fault=event, step=2)
    assert outcome.code == STALLED and outcome.seconds < 60
    assert not left_by(outcome)
    line = next(line for line in outcome.stderr.splitlines() if "guards.stall_timeout" in line)
    assert line.startswith("rank 0: nothing moved for 3 s") and f"it waited for {waits_for}" in line
    if event == "hang":
        assert "after step 1;" in line and "faulty_run.py:" in line and " hang < " in line


def test_a_killed_worker_is_one_line_and_no_bug(shards: Path, tmp_path: Path) -> None:
    outcome = go(tmp_path, shards, ["train_loader.num_workers=1"], fault="killed_worker")
    assert outcome.code == MISTAKE and "Traceback" not in outcome.stderr
    assert "was ended by a signal: Killed, often for lack of memory: lower num_workers" in last_line(outcome)


def test_unread_data_is_a_mistake_with_one_line(shards: Path, tmp_path: Path) -> None:
    outcome = go(tmp_path, shards, fault="mistake")
    assert outcome.code == MISTAKE and "Traceback" not in outcome.stderr
    assert last_line(outcome) == (
        "composer-path train: shard shard.00000.mds of a/set: hash: another hash; convert the data again"
    )
