"""What the speed comes from, counted, and the gate that stands before the times."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import packed_step, step_speed
from benchmarks.measure import UnequalError, require_equal
from benchmarks.proportions import STAGES, build_proportioned_model, draw_batch
from benchmarks.step_speed import BASELINE, OURS, VARIANTS, Outcome, Variant, compare, run_step
from composer_path import PathMLLM
from composer_path.batches.batch import Batch, split_batch
from composer_path.batches.dataset import Sample


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


def operations(model: PathMLLM, samples: list[Sample], variant: Variant) -> tuple[int, Outcome]:
    """Of a step's matrix products, as torch counts them; a test times nothing."""
    with FlopCounterMode(display=False) as counter:
        outcome = run_step(model, samples, variant)
    return counter.get_total_flops(), outcome


def test_packed_instructions_take_at_most_a_padded_ones_operations_over_1_3() -> None:
    model = build_proportioned_model(STAGES["instructions"], image_size=112, llama=ONE_LAYER)
    samples = draw_batch("instructions", 6, 0, 112, 3)
    padded, expected = operations(model, samples, VARIANTS["padded, no checkpointing"])
    packed, outcome = operations(model, samples, VARIANTS[OURS])
    assert packed < padded / 1.3  # measured 1.36
    require_equal(OURS, outcome.numbers(), expected.numbers())


def test_a_frozen_language_model_takes_at_most_75_percent_of_a_trained_ones_operations() -> None:
    samples = draw_batch("captions", 2, 0, 112, 1)
    frozen, trained = (
        operations(build_proportioned_model(STAGES[suite], image_size=112), samples, VARIANTS[OURS])
        for suite in ("captions", "instructions")
    )
    assert frozen[0] < 0.75 * trained[0]  # measured 0.674
    assert frozen[1].loss == trained[1].loss


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
