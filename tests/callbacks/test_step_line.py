"""One clear line a step, from what others log."""

from __future__ import annotations

import io
import re

import pytest
import torch
from composer.core import State, Time, Timestamp
from composer.devices import DeviceCPU
from composer.loggers import Logger

from composer_path.callbacks import StepLine
from composer_path.run.late_losses import LateLosses


@pytest.fixture
def state() -> State:
    model = torch.nn.Linear(1, 1)
    state = State(model, rank_zero_seed=0, run_name="a_run", device=DeviceCPU(), max_duration="6ba")
    groups = [{"params": [model.weight], "lr": 2e-3}, {"params": [model.bias], "lr": 2e-5}]
    state.optimizers = torch.optim.AdamW(groups)
    return state


def lines_of(state: State, line: StepLine, steps: range) -> list[str]:
    stream = io.StringIO()
    line.stream = stream
    for step in steps:
        line.log_metrics({"loss/train/total": torch.tensor(1.0 / step)})
        state.timestamp = Timestamp(batch=step, sample=8 * step)
        line.batch_end(state, Logger(state))
    return stream.getvalue().splitlines()


def test_a_step_has_its_number_loss_rates_and_speed(state: State) -> None:
    first, second = lines_of(state, StepLine(), range(1, 3))
    assert re.fullmatch(r"a_run step 1/6  loss 1\.0000  lr 2\.00e-05 2\.00e-03  [\d.]+ samples/s", first)
    assert second.startswith("a_run step 2/6  loss 0.5000")


class Coming(LateLosses):
    """Losses that come when they are told to."""

    here = False

    def arrived(self) -> bool:
        return self.here


def test_a_line_waits_for_its_loss_until_the_next_step_or_evaluation(state: State) -> None:
    stream = io.StringIO()
    line, logger = StepLine(), Logger(state)
    line.stream = stream
    late = [Coming({"loss/train/total": torch.tensor([1.0 / step])}, 1) for step in (1, 2, 3)]
    late[2].here = True
    for step, losses in enumerate(late, start=1):
        line.log_losses(losses, step - 1)
        state.timestamp = Timestamp(batch=step, sample=8 * step)
        line.batch_end(state, logger)
        printed = len(stream.getvalue().splitlines())
        assert printed == (0, 1, 3)[step - 1]
    late[2].here = False
    line.batch_end(state, logger)
    assert len(stream.getvalue().splitlines()) == 3
    line.eval_start(state, logger)
    found = [text.split()[2:5] for text in stream.getvalue().splitlines()]
    assert found == [["1/6", "loss", "1.0000"], ["2/6", "loss", "0.5000"], *[["3/6", "loss", "0.3333"]] * 2]


def test_only_each_nth_step_is_printed(state: State) -> None:
    assert [line.split()[2] for line in lines_of(state, StepLine(every=3), range(1, 7))] == ["3/6", "6/6"]


@pytest.mark.parametrize(
    ("duration", "length", "total"), [("2ep", 12, "/24"), ("6ba", None, "/6"), ("2ep", None, ""), ("900sp", 12, "")]
)
def test_the_number_of_steps_is_shown_where_it_is_known(
    state: State, duration: str, length: int | None, total: str
) -> None:
    state.max_duration = Time.from_timestring(duration)
    if length is not None:
        state.set_dataloader(range(length), "train")
    (line,) = lines_of(state, StepLine(), range(1, 2))
    assert line.startswith(f"a_run step 1{total}  loss")


def test_an_evaluation_prints_what_it_found(state: State, capsys: pytest.CaptureFixture[str]) -> None:
    line = StepLine()
    line.eval_end(state, Logger(state))
    assert capsys.readouterr().err == ""
    line.log_metrics({"metrics/heldout/token_loss": torch.tensor(2.5), "time/batch": 3})
    line.eval_end(state, Logger(state))
    assert capsys.readouterr().err == "a_run step 0  heldout/token_loss 2.5000\n"
