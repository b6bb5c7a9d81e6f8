"""Speed claims with slack, on every commit, and the gate that stands before them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import packed_step, step_speed
from benchmarks.measure import UnequalError, require_equal
from benchmarks.step_speed import BASELINE, OURS, VARIANTS, Variant, compare, frozen_against_trained
from composer_path.batches.batch import Batch, split_batch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Process time adds up threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


ONE_LAYER = {"num_hidden_layers": 1}


def chosen(*names: str) -> dict[str, Variant]:
    return {name: VARIANTS[name] for name in names}


def without_borders(batch: Batch, size: int) -> list[Batch]:
    """Microbatches whose samples see each other."""
    parts = split_batch(batch, size)
    ends = [part.cu_seq_lens[[0, -1]] for part in parts]
    return [replace(part, cu_seq_lens=end, max_seq_len=int(end[-1])) for part, end in zip(parts, ends, strict=True)]


def test_packed_instructions_are_at_least_1_2_times_as_fast_as_padded_ones() -> None:
    found = compare(
        "instructions",
        chosen("padded, no checkpointing", OURS),  # the reference-like step would recompute besides
        batch_size=6,
        repetitions=3,
        image_size=112,
        shorter=3,
        llama=ONE_LAYER,
    )
    assert found["variants"][OURS]["speed_over_first"]["median"] > 1.2
    assert all(row["largest_relative_error"] < 1e-5 for row in found["variants"].values())  # measured 2e-7


def test_a_frozen_language_model_takes_at_most_85_percent_of_a_trained_ones_time() -> None:
    found = frozen_against_trained(batch_size=2, repetitions=3, image_size=112)
    assert found["time_over_trained"]["median"] < 0.85


def test_the_gate_refuses_a_variant_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_step, "split_batch", without_borders)
    with pytest.raises(UnequalError, match=r"instructions: ours.*relative error"):
        compare(
            "instructions",
            chosen(BASELINE, OURS),
            batch_size=2,
            repetitions=1,
            image_size=112,
            shorter=8,
            llama=ONE_LAYER,
        )


def test_a_run_whose_gate_fails_writes_nothing_and_exits_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[str] = []
    monkeypatch.setattr(step_speed, "write_result", lambda name, result: written.append(name))
    monkeypatch.setattr(step_speed, "compare", partial(compare, image_size=112, llama=ONE_LAYER))
    monkeypatch.setattr(packed_step, "split_batch", without_borders)
    assert step_speed.main(["--repetitions", "1"]) == 1
    assert not written
    assert "no time is reported" in capsys.readouterr().err


@pytest.mark.parametrize("loss", [1.00002, float("nan")])
def test_numbers_that_differ_by_more_than_1e_5_or_are_none_are_refused(loss: float) -> None:
    assert require_equal("same", {"loss": 1.000001}, {"loss": 1.0})["loss"] == pytest.approx(1e-6)
    with pytest.raises(UnequalError, match="loss is"):
        require_equal("other", {"loss": loss}, {"loss": 1.0})
