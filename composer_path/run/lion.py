"""Lion, an optimizer with one moment that steps by signs (Chen et al. 2023, arXiv 2302.06675)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class Lion(Optimizer):
    """Steps by the sign of an average of gradient and momentum: half of AdamW's state.

    Rates are 3 to 10 times lower than AdamW's, weight decay as much higher, as its authors advise.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        betas: Of the average that is stepped by, and of the one that is kept.
        weight_decay: Times the rate is taken off each weight.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """1. Decay the weights. 2. Step by the sign of the first average. 3. Keep the second one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                kept = state["exp_avg"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(torch.sign(kept * first + p.grad * (1 - first)), alpha=-group["lr"])
                kept.mul_(second).add_(p.grad, alpha=1 - second)
        return loss
