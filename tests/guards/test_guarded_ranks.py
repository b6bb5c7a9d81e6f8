"""Two ranks under `composer -n 2` end together, with one word on why."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from faulty_run import Outcome, go
from test_guarded_run import steps_saved

from composer_path.guards.ending import INTERRUPTED, LOST, MISTAKE, NOT_FINITE, STALLED, STOPPED

SHARDED = ["trainer.save_interval=100ba"]
DDP = ["trainer.parallelism_config=null", "trainer.save_interval=100ba"]
MOST = 60  # seconds with the start, on a busy machine; a rank that waits for another does so for minutes


def everything(outcome: Outcome) -> str:
    return outcome.stdout + outcome.stderr


SLOW = pytest.mark.slow  # what is like another one but for a detail


@pytest.mark.parametrize("rank", [pytest.param(0, marks=SLOW), 1])
def test_a_bug_on_one_rank_ends_both_within_seconds_and_is_seen_once(rank: int, shards: Path, tmp_path: Path) -> None:
    outcome = go(tmp_path, shards, fault="error", rank=rank, ranks=2)
    assert outcome.code == 1 and outcome.seconds < MOST
    assert everything(outcome).count("RuntimeError: a bug on purpose") == 1
    assert everything(outcome).count("Traceback") == 1 and "a bug on purpose" in outcome.stderr


def test_a_rank_that_is_killed_is_said_by_the_other_in_a_line(shards: Path, tmp_path: Path) -> None:
    outcome = go(tmp_path, shards, fault="killed", rank=1, ranks=2)
    assert outcome.code == LOST and outcome.seconds < MOST
    assert everything(outcome).count("another rank is gone without a word") == 1
    assert "Traceback" not in everything(outcome)


def test_ranks_whose_launcher_is_killed_save_and_end(shards: Path, tmp_path: Path) -> None:
    killed = [("batch_start-1-2", signal.SIGKILL, "leader")]
    outcome = go(tmp_path, shards, SHARDED, slow=1.0, ranks=2, signals=killed)
    until = time.monotonic() + MOST
    while time.monotonic() < until and not steps_saved(outcome):
        time.sleep(0.1)
    [saved] = steps_saved(outcome)
    assert int(saved.rpartition("ba")[2]) in (2, 3)  # of 6: they didn't go on by themselves


@pytest.mark.parametrize("rank", [pytest.param(0, marks=SLOW), 1])
def test_a_mistake_seen_by_one_rank_is_one_line_of_the_first(rank: int, shards: Path, tmp_path: Path) -> None:
    outcome = go(tmp_path, shards, fault="mistake", rank=rank, ranks=2)
    assert outcome.code == MISTAKE and outcome.seconds < MOST
    assert everything(outcome).count("convert the data again") == outcome.stderr.count("convert the data again") == 1
    assert "Traceback" not in everything(outcome)


@pytest.mark.parametrize("overrides", [SHARDED, pytest.param(DDP, marks=SLOW)], ids=["fsdp", "ddp"])
@pytest.mark.parametrize("fault", ["nan_loss", pytest.param("nan_gradient", marks=SLOW)])
def test_nan_on_one_rank_stops_both_with_its_rank_and_samples(
    fault: str, overrides: list[str], shards: Path, tmp_path: Path
) -> None:
    outcome = go(tmp_path, shards, [*overrides, "trainer.save_interval=1ba"], fault=fault, rank=1, ranks=2)
    assert outcome.code == NOT_FINITE and steps_saved(outcome)[-1:] == saved(outcome, 1)
    assert everything(outcome).count("rank 1 must be finite; found NaN or infinity with samples ") == 1
    assert "Traceback" not in everything(outcome)


def saved(outcome: Outcome, step: int) -> list[str]:
    """The newest checkpoint, a folder or a file."""
    return [
        f"ep0-ba{step}" if (outcome.folder / "checkpoints" / f"ep0-ba{step}").is_dir() else f"ep0-ba{step}-rank0.pt"
    ]


def test_a_step_is_left_out_by_both(shards: Path, tmp_path: Path) -> None:
    outcome = go(tmp_path, shards, ["guards.on_nan=skip"], fault="nan_loss", rank=1, step=2, ranks=2)
    assert outcome.code == 0 and "step 2: the loss of rank 1" in outcome.stderr
    assert outcome.losses["3"] == outcome.losses["3"]  # not NaN


@pytest.mark.parametrize("fault", ["hang", pytest.param("stopped", marks=SLOW)])
def test_a_rank_that_hangs_ends_both_and_each_says_where_it_waits(fault: str, shards: Path, tmp_path: Path) -> None:
    outcome = go(tmp_path, shards, ["guards.stall_timeout=3"], fault=fault, rank=1, step=2, ranks=2)
    assert outcome.code == STALLED and outcome.seconds < MOST + 35  # Composer's launcher gives a stopped rank 30 s
    assert "rank 0: nothing moved for 3 s (guards.stall_timeout) after step 1" in outcome.stderr
    if fault == "hang":
        assert "rank 1: nothing moved for 3 s" in outcome.stdout and "faulty_run.py" in outcome.stdout


@pytest.mark.parametrize(
    ("number", "whom", "launcher", "code"),
    [
        (signal.SIGTERM, "leader", "composer", STOPPED),
        pytest.param(signal.SIGTERM, "group", "composer", STOPPED, marks=SLOW),
        pytest.param(signal.SIGINT, "group", "composer", INTERRUPTED, marks=SLOW),
        pytest.param(signal.SIGTERM, "leader", "ours", STOPPED, marks=SLOW),
        pytest.param(signal.SIGUSR1, "group", "ours", STOPPED, marks=SLOW),
    ],
)
def test_a_signal_stops_both_at_the_same_step_and_the_same_command_goes_on(
    number: int, whom: str, launcher: str, code: int, shards: Path, tmp_path: Path
) -> None:
    words = [*SHARDED, "guards.save_on=[SIGTERM, SIGUSR1]"]
    signals = [("batch_start-1-2", number, whom)]
    outcome = go(tmp_path, shards, words, slow=0.3, ranks=2, signals=signals, launcher=launcher)
    assert outcome.code == code
    assert f"stopped by {signal.Signals(number).name} at step " in outcome.stderr and len(steps_saved(outcome)) == 1
    if launcher == "ours":
        assert "Traceback" not in everything(outcome)
    step = int(steps_saved(outcome)[0].rpartition("ba")[2])
    resumed = go(tmp_path, shards, words, ranks=2)
    assert "step 1/6" not in resumed.stderr
    assert resumed.code == 0 and list(resumed.losses) == [str(at) for at in range(1, 7)]
    assert step in (2, 3) and outcome.losses == {at: resumed.losses[at] for at in map(str, range(1, step + 1))}
