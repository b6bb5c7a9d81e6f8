"""A step's flags, and weights that must be finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from composer_path.guards.finite import StepFlags, Verdict, norm_of, not_finite

CPU = torch.device("cpu")
GOOD = torch.tensor([1.0, -2.0])


def verdict(losses: list[Any], gradients: list[Any], reason: int = 0) -> Verdict:
    flags = StepFlags([torch.as_tensor(loss) for loss in losses], gradients, reason, CPU)
    assert flags.arrived()
    return flags.read()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bad_number_in_any_microbatch_or_gradient_is_seen(bad: float, dtype: torch.dtype) -> None:
    assert verdict([1.0, bad], [GOOD]) == Verdict(0, None, 0)
    assert verdict([[1.0]], [GOOD, torch.tensor([[0.0, bad]], dtype=dtype), GOOD]) == Verdict(None, 0, 0)


def test_finite_numbers_are_fine_and_a_wish_to_stop_travels_along() -> None:
    assert verdict([1.0], [GOOD, GOOD.bfloat16(), torch.zeros(0)], reason=15) == Verdict(None, None, 15)
    assert verdict([], []).finite


def test_a_gradient_whose_norm_overflows_is_not_finite() -> None:
    assert verdict([1.0], [torch.full((4,), 3e38)]).gradient_of == 0


def test_the_norm_is_that_of_all_tensors_and_leaves_whole_numbers_out() -> None:
    assert norm_of([torch.tensor([3.0]), torch.tensor([[4.0]]), torch.tensor([7])]) == 5


def test_weights_that_are_not_finite_are_named() -> None:
    weights = {name: torch.ones(2) for name in "abcde"}
    assert not_finite(weights | {"ids": torch.tensor([1]), "none": torch.zeros(0)}) == []
    for name in "bcde":
        weights[name] = torch.tensor([1.0, float("nan" if name == "b" else "-inf")])
    assert not_finite(weights) == ["b", "c", "d", "e"]


@pytest.mark.gpu
def test_on_a_gpu_the_host_goes_on_until_it_asks() -> None:
    a = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    for _ in range(50):
        b = a @ a
    with torch.no_grad():
        flags = StepFlags([b[0, 0]], [b, torch.full((3,), torch.nan, device="cuda")], 0, torch.device("cuda", 0))
    assert not flags.arrived()
    assert flags.read() == Verdict(None, 0, 0)
