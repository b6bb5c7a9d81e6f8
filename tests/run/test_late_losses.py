"""A step's losses, read when they have come."""

from __future__ import annotations

import pytest
import torch

from composer_path.run.late_losses import LateLosses


def test_losses_are_means_over_ranks_and_keep_what_they_were() -> None:
    total = torch.tensor([3.0])
    losses = LateLosses({"total": total, "square": torch.tensor(1.0)}, 2)
    total += 1  # the next step's
    assert losses.arrived() and dict(losses) == {"total": 1.5, "square": 0.5}
    with pytest.raises(KeyError):
        losses["other"]
    assert losses.get("other") is None


@pytest.mark.gpu
def test_on_a_gpu_the_host_goes_on_until_it_asks() -> None:
    a = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    for _ in range(50):
        b = a @ a
    losses = LateLosses({"total": b[0, 0].reshape(1) * 0 + 7}, 1)
    assert not losses.arrived()
    assert losses["total"] == 7 and losses.arrived()
