"""AdamW with moments in 8 bits by torchao, blocks of which no sharding cuts, and a state of plain tensors.

torchao's own decides on each rank what it holds in 8 bits, and its state is tensors of a class of its own: files say of
them that they are larger than they are, and what another number of ranks cuts otherwise can't be read again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW8bit as TorchaoAdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit

LEAST = 4096  # weights; what is smaller keeps fp32 moments, as with torchao and bitsandbytes
PARTS = ("codes", "scale", "qmap")


class AdamW8bit(TorchaoAdamW8bit):
    """torchao's, whose moments are 8 bits wide where a row of the weight is a whole number of blocks.

    A weight is cut by rows over ranks, so a block is then whole on one rank, for any number of them. Vectors and other
    widths keep moments in fp32.
    """

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        width = math.prod(p.shape[1:])
        if p.ndim < 2 or p.numel() < LEAST or width % self.block_size:
            return torch.zeros_like(p)
        local = p.to_local() if isinstance(p, DTensor) else p
        if not local.numel():  # of a rank that has no row of it
            return torch.zeros_like(p)
        return _laid_out_as(p, self._subclass_zeros(local, signed, self.block_size))

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with a moment in 8 bits as three plain tensors: its codes, its scales by row, what codes mean."""
        found = super().state_dict()
        found["state"] = {key: self._plain(moments) for key, moments in found["state"].items()}
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        state = {key: _whole(moments) for key, moments in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": state})

    def _plain(self, moments: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in moments.items():
            local = value.to_local() if isinstance(value, DTensor) else value
            width = math.prod(value.shape[1:]) if isinstance(value, Tensor) else 0
            if isinstance(local, OptimState8bit):
                parts = local.codes, local.scale.view(len(local), -1), local.qmap
            elif isinstance(value, DTensor) and not local.numel() and width and width % self.block_size == 0:
                parts = local.to(torch.uint8), local.new_zeros(0, width // self.block_size), local.new_zeros(256)
            else:
                found[name] = value
                continue
            codes, scale, qmap = parts
            found |= {f"{name}.codes": _laid_out_as(value, codes), f"{name}.qmap": qmap}
            found[f"{name}.scale"] = _laid_out_as(value, scale)
        return found


def _whole(moments: Mapping[str, Any]) -> dict[str, Any]:
    """Moments as the optimizer has them, of those as they are written."""
    found = {name: value for name, value in moments.items() if name.rpartition(".")[2] not in PARTS}
    for name in [key.removesuffix(".codes") for key in moments if key.endswith(".codes")]:
        codes, scale, qmap = (moments[f"{name}.{part}"] for part in PARTS)
        local, rows = (one.to_local() if isinstance(one, DTensor) else one for one in (codes, scale))
        if not local.numel():
            found[name] = _laid_out_as(codes, local.float())
            continue
        signed = bool((qmap < 0).any())
        found[name] = _laid_out_as(codes, OptimState8bit(local, rows.reshape(-1), qmap, signed))
    return found


def _laid_out_as(like: Tensor, local: Tensor) -> Tensor:
    """This rank's rows of a tensor that is spread as another one; its columns may be others."""
    if not isinstance(like, DTensor):
        return local
    shape = torch.Size((like.shape[0], *local.shape[1:]))
    stride = [math.prod(shape[at + 1 :]) for at in range(len(shape))]
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=tuple(stride)
    )
