"""Models without storage for their parameters: what is built so, and that nothing of it stays behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from composer_path.models.parameters import built_emptied, empty_parameters


class Asking(nn.Module):
    """Computes a table from its parameter while it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 2.0), requires_grad=False)
        self.inner = nn.Linear(3, 2)
        self.register_buffer("table", torch.empty(3).copy_(self.scale * 2))


def test_the_empty_context_is_left_behind_even_after_an_error() -> None:
    register = torch.nn.Module.register_parameter
    with pytest.raises(ZeroDivisionError), empty_parameters():
        assert torch.nn.Linear(2, 2).weight.is_meta
        raise ZeroDivisionError
    assert torch.nn.Module.register_parameter is register
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_what_computes_with_its_parameters_while_it_is_built_is_emptied_afterwards() -> None:
    with empty_parameters():
        with pytest.raises(NotImplementedError):
            Asking()
        module: Any = built_emptied(Asking)
        after = nn.Linear(2, 2)
    assert {name for name, p in module.named_parameters() if p.is_meta} == {"scale", "inner.weight", "inner.bias"}
    assert not module.scale.requires_grad and after.weight.is_meta
    assert module.table.tolist() == [4.0] * 3
    assert not built_emptied(Asking).scale.is_meta  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("within", [True, False])
def test_an_error_that_has_other_reasons_is_told(within: bool) -> None:
    def build() -> nn.Module:
        raise RuntimeError("no such thing")

    told: Callable[[], nn.Module] = build
    with empty_parameters(within), pytest.raises(RuntimeError, match="no such thing"):
        built_emptied(told)
