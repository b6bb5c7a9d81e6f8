"""The losses of a step on their way from the device: the host goes on, and waits only if somebody asks at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class LateLosses(Mapping[str, float]):
    """Losses by name, each the mean over ranks.

    Args:
        sums: Over ranks, on the device, one number each.
        world_size: Ranks.
    """

    def __init__(self, sums: Mapping[str, Tensor], world_size: int) -> None:
        self._at = {name: at for at, name in enumerate(sums)}
        self.world_size = world_size
        self.numbers: list[float] = []
        on_device = torch.cat([value.detach().reshape(1) for value in sums.values()])
        self.event = torch.cuda.Event() if on_device.is_cuda else None
        if self.event is None:
            self.host = on_device
        else:  # only a copy to page-locked memory runs beside the host
            self.host = torch.empty(len(on_device), dtype=on_device.dtype, pin_memory=True)
            self.host.copy_(on_device, non_blocking=True)
            self.event.record()

    def arrived(self) -> bool:
        """Whether reading waits for nothing."""
        return self.event is None or self.event.query()

    def __getitem__(self, name: str) -> float:
        """One loss, waited for."""
        at = self._at[name]
        if not self.numbers:
            if self.event is not None:
                self.event.synchronize()
            self.numbers = [value / self.world_size for value in self.host.tolist()]
        return self.numbers[at]

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)

    def __len__(self) -> int:
        return len(self._at)
