"""What a batch holds is logged from the counts that the loader made."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
import torch
from composer.core import State
from composer.devices import DeviceCPU
from composer.loggers import InMemoryLogger, Logger

from composer_path.batches.batch import PackedCollator
from composer_path.callbacks import BatchReport


def sample(sample_id: int, length: int, answers: int, images: int = 0, problem: str | None = None) -> dict[str, Any]:
    labels = torch.full((length,), -100)
    labels[length - answers :] = 5
    return {
        "sample_id": sample_id,
        "input_ids": torch.full((length,), 7),
        "labels": labels,
        "pixel_values": torch.zeros((images, 3, 4, 4), dtype=torch.uint8),
        "is_he": torch.zeros(images, dtype=torch.bool),
        "source": "all",
        "problem": problem,
    }


class Bench:
    """A state with a logger that remembers."""

    def __init__(self) -> None:
        self.state = State(torch.nn.Linear(1, 1), rank_zero_seed=0, run_name="a_run", device=DeviceCPU())
        self.memory = InMemoryLogger()
        self.logger = Logger(self.state, [self.memory])
        self.memory.init(self.state, self.logger)

    def last(self, name: str) -> Any:
        return self.memory.data[name][-1][1]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_shares_and_counts_are_those_of_the_batch(bench: Bench) -> None:
    bench.state.batch = PackedCollator(12)([sample(0, 10, 3, images=2), sample(1, 6, 1), sample(2, 4, 2, images=1)])
    BatchReport().batch_start(bench.state, bench.logger)
    assert bench.last("batch/tokens") == 20
    assert bench.last("batch/images") == 3
    assert bench.last("batch/microbatches") == 2
    assert bench.last("batch/supervised_share") == pytest.approx(6 / 20)
    assert bench.last("batch/padding_avoided") == pytest.approx(1 - 20 / 30)  # padded: three rows of ten
    assert bench.last("batch/unusable_samples") == 0


def test_equal_lengths_avoid_no_padding(bench: Bench) -> None:
    bench.state.batch = PackedCollator()([sample(0, 5, 2), sample(1, 5, 2)])
    BatchReport().batch_start(bench.state, bench.logger)
    assert bench.last("batch/padding_avoided") == 0


def test_unusable_samples_are_counted_and_each_kind_is_named_once(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    report = BatchReport()
    batches = [
        [sample(3, 4, 2), sample(8, 1, 0, problem="image is damaged")],
        [sample(5, 1, 0, problem="image is damaged"), sample(6, 1, 0, problem="no answer is left"), sample(7, 4, 2)],
    ]
    with caplog.at_level(logging.WARNING):
        for batch in batches:
            bench.state.batch = PackedCollator()(batch)
            report.batch_start(bench.state, bench.logger)
        assert bench.last("batch/unusable_samples") == 3
        assert [record.getMessage().split(" can't")[0] for record in caplog.records] == ["sample 8", "sample 6"]
        caplog.clear()
        report.epoch_end(bench.state, bench.logger)
    (summary,) = caplog.records
    assert summary.getMessage().endswith(": 2 times: image is damaged; 1 times: no answer is left")


def test_nothing_is_said_at_an_epochs_end_where_all_samples_were_used(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        BatchReport().epoch_end(bench.state, bench.logger)
    assert caplog.records == []


def test_waiting_for_data_is_a_share_of_the_step(bench: Bench) -> None:
    report = BatchReport()
    report.before_dataloader(bench.state, bench.logger)
    time.sleep(0.03)
    report.after_dataloader(bench.state, bench.logger)
    time.sleep(0.03)
    report.batch_end(bench.state, bench.logger)
    assert 0.1 < bench.last("batch/loader_wait_share") < 0.9
