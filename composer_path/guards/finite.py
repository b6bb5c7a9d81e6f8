"""Whether a step's numbers are finite, asked on the device: the ranks' answer comes late, and costs no waiting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from composer.utils import dist
from torch import Tensor
from torch.nn.utils import get_total_norm

from composer_path.weights import tensor_file

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Verdict:
    """What all ranks say of a step: the first rank whose loss, and whose gradient, isn't finite, and a wish to stop."""

    loss_of: int | None
    gradient_of: int | None
    reason: int

    @property
    def finite(self) -> bool:
        """Whether nothing is wrong."""
        return self.loss_of is None and self.gradient_of is None


class StepFlags:
    """A step's flags on their way from the device, as `LateLosses` are.

    Args:
        losses: Of this rank's microbatches.
        gradients: Of this rank, whole or its shards.
        reason: Why this rank is asked to stop; 0 if it isn't.
        device: Where they are combined over ranks.
    """

    def __init__(
        self, losses: Sequence[Tensor], gradients: Sequence[Tensor], reason: int, device: torch.device
    ) -> None:
        rank, ranks = dist.get_global_rank(), dist.get_world_size()
        nobody = torch.full((), ranks, dtype=torch.int64, device=device)
        flags = torch.stack(
            [
                torch.where(_all_finite(losses, device), nobody, rank),
                torch.where(torch.isfinite(norm_of(gradients).to(device)), nobody, rank),
                torch.full_like(nobody, -reason),
            ]
        )
        if ranks > 1:
            dist.all_reduce(flags, reduce_operation="MIN")
        self.ranks = ranks
        self.event = torch.cuda.Event() if flags.is_cuda else None
        if self.event is None:
            self.host = flags
        else:
            self.host = torch.empty(3, dtype=flags.dtype, pin_memory=True)
            self.host.copy_(flags, non_blocking=True)
            self.event.record()

    def arrived(self) -> bool:
        """Whether reading waits for nothing."""
        return self.event is None or self.event.query()

    def read(self) -> Verdict:
        """What they say, waited for."""
        if self.event is not None:
            self.event.synchronize()
        loss, gradient, reason = self.host.tolist()
        return Verdict(
            None if loss == self.ranks else int(loss), None if gradient == self.ranks else int(gradient), -int(reason)
        )


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor, or all of another."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def norm_of(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of this rank's tensors of real numbers together."""
    parts = [local(tensor.detach()) for tensor in tensors if tensor.dtype in _FLOATS]
    return get_total_norm(parts) if parts else torch.zeros(())


def _all_finite(losses: Sequence[Tensor], device: torch.device) -> Tensor:
    if not losses:
        return torch.ones((), dtype=torch.bool, device=device)
    return torch.isfinite(torch.stack([loss.detach().float().reshape(()).to(device) for loss in losses])).all()


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity, of their shards here."""
    return tensor_file.not_finite({name: local(tensor.detach()) for name, tensor in tensors.items()})
