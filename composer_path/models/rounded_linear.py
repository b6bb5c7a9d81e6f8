"""Frozen linear layers whose weights are kept in fewer bytes than bf16's two: float8, int8, or NF4's half a byte."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

Rounding = Literal["float8", "int8", "nf4"]
FLOAT8 = torch.float8_e4m3fn
NF4_NEEDS = "'nf4' needs the package bitsandbytes (pip install composer_path[nf4])"
_LARGEST = torch.finfo(FLOAT8).max
_BLOCKS = 64, 256  # weights that share a scale in NF4, and scales that share one of theirs: bitsandbytes' own sizes

Kept = dict[str, Tensor]  # a weight's bytes, under `weight`, and what else restores it
Restore = Callable[..., Tensor]


class RoundedLinear(nn.Module):
    """Computes as the layer it is made of, with rounded weights.

    The weight is restored for each product and given up after it, in the backward pass too, where torchao's weight-only
    layers keep every restored weight (seen in 0.11 and 0.18). Its bytes are held as uint8: no conversion of a module's
    dtype touches them, and every backend can send them.

    Args:
        linear: A frozen layer.
        rounding: `float8` (e4m3, 3 bits of mantissa) or `int8`, each with one scale for each output; or `nf4`: 16
            levels, a scale for each 64 weights and scales of these scales (QLoRA, arXiv 2305.14314), by bitsandbytes.
    """

    def __init__(self, linear: nn.Linear, rounding: Rounding = "float8") -> None:
        super().__init__()
        weight = linear.weight.detach()
        kept, self.restore = _ROUNDINGS[rounding](weight)
        self.weight = nn.Parameter(kept.pop("weight"), requires_grad=False)
        self.weight.stands_for = weight.numel()  # type: ignore[attr-defined]
        self.statistics = tuple(kept)
        for name, statistic in kept.items():
            self.register_buffer(name, statistic, persistent=False)
        self.bias, self.dtype, self.rounding = linear.bias, linear.weight.dtype, rounding
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def restored(self) -> Tensor:
        """The weight in the layer's own dtype."""
        return self.restore(self.weight, *self._statistics()).to(self.dtype)

    def forward(self, values: Tensor) -> Tensor:
        """1. Restore the weight. 2. The product. Gradients pass to the input."""
        return _Product.apply(values, self.restore, self.dtype, self.bias, self.weight, *self._statistics())

    def extra_repr(self) -> str:
        """As of a linear layer."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, rounding={self.rounding}"

    def _statistics(self) -> list[Tensor]:
        return [self.get_buffer(name) for name in self.statistics]


def num_weights(parameter: Tensor) -> int:
    """How many weights a parameter stands for, rounded or not."""
    return int(getattr(parameter, "stands_for", parameter.numel()))


def is_rounded(module: nn.Module) -> bool:
    """Whether some of a module's weights are kept in fewer bytes: what it holds is then not what it was read from."""
    return any(isinstance(child, RoundedLinear) for child in module.modules())


def hold_rounded(blocks: Iterable[nn.Module], rounding: Rounding) -> None:
    """Put a `RoundedLinear` in place of every frozen linear layer of the blocks; adapters beside them stay.

    Raises:
        ValueError: bitsandbytes isn't installed, and `nf4` asks for it.
    """
    if rounding == "nf4" and not has_nf4():
        raise ValueError(f"execution.frozen_weights: {NF4_NEEDS}")
    for block in blocks:
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear and not child.weight.requires_grad:
                    setattr(module, name, RoundedLinear(child, rounding))


def has_nf4() -> bool:
    """Whether bitsandbytes is installed."""
    return find_spec("bitsandbytes") is not None


class _Product(Function):
    """Keeps the bytes for the backward pass, which are there anyway, and restores the weight again."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        values: Tensor,
        restore: Restore,
        dtype: torch.dtype,
        bias: Tensor | None,
        weight: Tensor,
        *statistics: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(weight, *statistics)
        ctx.restore, ctx.dtype = restore, dtype
        return F.linear(values, restore(weight, *statistics).to(dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, *statistics = ctx.saved_tensors
        into = gradient @ ctx.restore(weight, *statistics).to(ctx.dtype).to(gradient.dtype)
        return into, *[None] * (4 + len(statistics))


def _scales(weight: Tensor, largest: float) -> Tensor:
    """What each output's weights are divided by, so that the largest becomes `largest`."""
    return weight.float().abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / largest


def _float8(weight: Tensor) -> tuple[Kept, Restore]:
    scale = _scales(weight, _LARGEST)
    rounded = (weight.float() / scale[:, None]).to(FLOAT8).view(torch.uint8)
    return {"weight": rounded, "scale": scale}, _from_float8


def _from_float8(rounded: Tensor, scale: Tensor) -> Tensor:
    return rounded.view(FLOAT8).float() * scale[:, None]


def _int8(weight: Tensor) -> tuple[Kept, Restore]:
    scale = _scales(weight, 127.0)
    rounded = (weight.float() / scale[:, None]).round().to(torch.int8).view(torch.uint8)
    return {"weight": rounded, "scale": scale}, _from_int8


def _from_int8(rounded: Tensor, scale: Tensor) -> Tensor:
    return rounded.view(torch.int8).float() * scale[:, None]


def _nf4(weight: Tensor) -> tuple[Kept, Restore]:
    from bitsandbytes.functional import quantize_4bit

    rounded, state = quantize_4bit(
        weight.contiguous(), blocksize=_BLOCKS[0], compress_statistics=True, quant_type="nf4"
    )
    kept = {"weight": rounded, "scale": state.absmax, "levels": state.code, "offset": state.offset}
    kept |= {"scale_of_scales": state.state2.absmax, "levels_of_scales": state.state2.code}
    return kept, partial(_from_nf4, weight.shape, weight.dtype)


def _from_nf4(
    shape: torch.Size,
    dtype: torch.dtype,
    rounded: Tensor,
    scale: Tensor,
    levels: Tensor,
    offset: Tensor,
    scale_of_scales: Tensor,
    levels_of_scales: Tensor,
) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    of_scales = QuantState(scale_of_scales, code=levels_of_scales, blocksize=_BLOCKS[1], dtype=torch.float32)
    state = QuantState(scale, shape, levels, _BLOCKS[0], quant_type="nf4", dtype=dtype, offset=offset, state2=of_scales)
    return dequantize_4bit(rounded, state)


_ROUNDINGS: dict[str, Callable[[Tensor], tuple[Kept, Restore]]] = {"float8": _float8, "int8": _int8, "nf4": _nf4}
