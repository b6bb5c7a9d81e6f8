"""Frozen linear layers whose weights are kept in float8: half of bf16's bytes, at a rounding of 3 bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FLOAT8).max


class Float8Linear(nn.Module):
    """Computes as the layer it is made of, with weights rounded to float8 (e4m3) and one scale for each output.

    The weight is restored for each product and given up after it, in the backward pass too, where torchao's weight-only
    layers keep every restored weight (seen in 0.11 and 0.18). Its bytes are held as uint8: no conversion of a module's
    dtype touches them, and every backend can send them.
    """

    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
        rounded = (weight / scale[:, None]).to(FLOAT8).view(torch.uint8)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.register_buffer("scale", scale, persistent=False)
        self.bias, self.dtype = linear.bias, linear.weight.dtype

    def restored(self) -> Tensor:
        """The weight in the layer's own dtype."""
        return _restore(self.weight, self.scale, self.dtype)

    def forward(self, values: Tensor) -> Tensor:
        """1. Restore the weight. 2. The product. Gradients pass to the input."""
        return _Product.apply(values, self.weight, self.scale, self.bias, self.dtype)

    def extra_repr(self) -> str:
        """As of a linear layer."""
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}, bias={self.bias is not None}"


def _restore(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight.view(FLOAT8).float() * scale[:, None]).to(dtype)


class _Product(Function):
    """Keeps the bytes for the backward pass, which are there anyway, and restores the weight again."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, values: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.dtype = dtype
        return F.linear(values, _restore(weight, scale, dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, scale = ctx.saved_tensors
        return gradient @ _restore(weight, scale, ctx.dtype).to(gradient.dtype), None, None, None, None


def hold_in_float8(blocks: Iterable[nn.Module]) -> None:
    """Put a `Float8Linear` in place of every linear layer of frozen blocks."""
    for block in blocks:
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, name, Float8Linear(child))
