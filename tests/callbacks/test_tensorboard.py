"""TensorBoard shows what it shows with Composer's own logger, from fewer records."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import composer.loggers
import pytest
import torch
from composer.core import State, Timestamp
from composer.devices import DeviceCPU
from composer.loggers import Logger

from composer_path.callbacks.tensorboard import TensorboardLogger
from composer_path.run.late_losses import LateLosses
from composer_path.run.names import named_classes


class Coming(LateLosses):
    """Losses that come when they are told to."""

    here = False

    def arrived(self) -> bool:
        return self.here


def records(folder: Path) -> tuple[dict[tuple[str, str], list[Any]], int]:
    """Values of each tag, per folder, and the number of records that hold values."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    shown: dict[tuple[str, str], list[Any]] = {}
    count = 0
    for path in sorted(folder.rglob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        for raw in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(raw)
            count += bool(event.summary.value)
            for value in event.summary.value:
                where = str(path.parent.relative_to(folder))
                number = value.simple_value if value.HasField("simple_value") else "not a number"
                shown.setdefault((where, value.tag), []).append((event.step, number))
    return shown, count


def log_a_run(kind: type[composer.loggers.TensorboardLogger], folder: Path) -> tuple[dict[Any, list[Any]], int]:
    """Four steps and an evaluation, whose numbers are of all kinds."""
    board = kind(log_dir=str(folder), flush_interval=3)
    state = State(torch.nn.Linear(1, 1), 0, "a_run", DeviceCPU(), max_duration="4ba", callbacks=[board])
    logger = Logger(state, [board])
    board.init(state, logger)
    board.log_hyperparameters({"recipe": "short"})
    running = torch.zeros(1)
    for step in range(1, 5):
        running += step
        logger.log_metrics({"batch/tokens": 100 * step, "batch/word": "text", "batch/table": {"no": "number"}})  # type: ignore[dict-item]
        logger.log_metrics({"loss/train/total": 1 / step, "running": running, "flag": True, "nan": float("nan")})  # type: ignore[dict-item]
        state.timestamp = Timestamp(batch=step)
        logger.log_metrics({"lr": 0.1 / step, "norm": torch.tensor(0.5 * step)})  # type: ignore[dict-item]
        board.batch_end(state, logger)
    logger.log_metrics({"metrics/loss": 0.25, "time/epoch": 1})
    board.eval_end(state, logger)
    logger.log_metrics({"time/epoch": 1})
    board.fit_end(state, logger)
    board.close(state, logger)
    return records(folder)


def test_every_number_is_shown_at_its_step_as_by_composers_own(tmp_path: Path) -> None:
    expected, many = log_a_run(composer.loggers.TensorboardLogger, tmp_path / "theirs")
    found, few = log_a_run(TensorboardLogger, tmp_path / "ours")
    # As text, in which nan is nan; sorted, as files of one moment have no order.
    assert sorted(map(str, found.items())) == sorted(map(str, expected.items()))
    assert found["a_run", "running"] == [(0, 1.0), (1, 3.0), (2, 6.0), (3, 10.0)]
    assert Counter(tag for _, tag in found)["loss/train/total"] == 1 and len(found) > 8
    assert few < 0.75 * many


def test_the_yaml_means_this_one() -> None:
    assert named_classes("loggers")["tensorboard"] is TensorboardLogger
    assert "step_line" not in named_classes("loggers")


@pytest.mark.parametrize("flush_interval", [100, 2])
def test_losses_are_written_at_their_step_when_they_have_come_or_the_file_closes(
    tmp_path: Path, flush_interval: int
) -> None:
    board = TensorboardLogger(log_dir=str(tmp_path), flush_interval=flush_interval)
    state = State(torch.nn.Linear(1, 1), 0, "a_run", DeviceCPU(), max_duration="4ba", callbacks=[board])
    logger = Logger(state, [board])
    board.init(state, logger)
    late = Coming({"loss/train/total": torch.tensor([3.0])}, 2)
    logger.log_metrics({"before": 1.0}, 0)
    board.log_losses(late, 0)
    state.timestamp = Timestamp(batch=1)
    board.batch_end(state, logger)
    assert len(board.waiting) == 2 and not late.numbers  # nobody has asked for it
    logger.log_metrics({"after": 2.0})
    state.timestamp = Timestamp(batch=2)
    late.here = flush_interval == 100
    board.batch_end(state, logger)
    assert not board.waiting
    board.close(state, logger)
    shown, _ = records(tmp_path)
    assert shown == {
        ("a_run", "before"): [(0, 1.0)],
        ("a_run", "loss/train/total"): [(0, 1.5)],
        ("a_run", "after"): [(1, 2.0)],
    }
