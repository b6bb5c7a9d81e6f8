"""Composer's SpeedMonitor, with what it lacks: images, answer tokens, HFU, and a peak for any GPU."""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Any

import torch
from composer.callbacks import SpeedMonitor
from composer.core import State
from composer.devices import Device
from composer.loggers import Logger
from composer.utils import dist

from composer_path.batches.batch import Batch

log = logging.getLogger(__name__)


class SpeedReport(SpeedMonitor):
    """Logs samples, tokens, images and answer tokens a second, MFU and HFU, over a window of steps.

    MFU is the share of the GPU's peak that went into operations the step needs: no padding, nothing computed twice,
    frozen weights without gradients, causal attention at half (`composer_path/models/flops.py`). HFU also counts
    what is computed a second time to save memory. Waiting for data is part of the time; evaluation isn't.

    Beside SpeedMonitor's `throughput/...` it logs, under `throughput/device/`, `images_per_sec`,
    `answer_tokens_per_sec` and `hfu` of the first rank, by the loader's counts: nothing is copied from the GPU.

    Args:
        window_size: Steps.
        gpu_flops_available: Peak of one GPU in FLOP/s. By default Composer's table (datasheet, dense); for a GPU that
            isn't there, the rate of a large product of matrices, measured once at the start.
        time_unit: Of the `time/...` metrics: seconds, minutes, hours or days.
    """

    def __init__(
        self, window_size: int = 100, gpu_flops_available: float | int | None = None, time_unit: str = "hours"
    ) -> None:
        super().__init__(window_size, gpu_flops_available, time_unit)
        # Per step: needed operations, computed operations, images, answer tokens; one entry more than steps, as in
        # SpeedMonitor, whose first entry only says when the window began.
        self.window: deque[tuple[float, float, int, int]] = deque(maxlen=window_size + 1)

    def init(self, state: State, logger: Logger) -> None:
        """Find the peak."""
        super().init(state, logger)
        if not self.gpu_flops_available and torch.cuda.is_available() and state.device.name == "gpu":
            self.gpu_flops_available = measure_peak(torch.device("cuda", torch.cuda.current_device()))
            found = "MFU is relative to %.0f TFLOP/s, measured here with a product of matrices; give the datasheet's as"
            log.warning(f"{found} callbacks.speed_report.gpu_flops_available", self.gpu_flops_available / 1e12)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Report the window that ends with this step; SpeedMonitor's numbers by its own formulas."""
        model: Any = getattr(state.model, "module", state.model)  # a `ComposerPathMLLM`, from within DDP
        batch: Batch = state.batch
        needed, computed = model.flops_per_batch(batch), model.hardware_flops_per_batch(batch)
        trained = state.timestamp.total_wct.total_seconds()
        self.window.append((needed, computed, len(batch.is_he), len(batch.targets)))
        self.history_samples.append(state.timestamp.sample.value)
        self.history_tokens.append(state.timestamp.token.value)
        self.history_wct.append(trained)
        self.history_flops.append(sum_over_ranks(needed, state.device))
        moments = {"train": trained, "val": self.total_eval_wct, "total": trained + self.total_eval_wct}
        metrics = {f"time/{name}": seconds / self.divider for name, seconds in moments.items()}
        if len(self.history_wct) == self.history_wct.maxlen:
            metrics |= self._rates()
        logger.log_metrics(metrics)

    def _rates(self) -> dict[str, float]:
        seconds, ranks = self.history_wct[-1] - self.history_wct[0], dist.get_world_size()
        tokens = self.history_tokens[-1] - self.history_tokens[0]
        flops = sum(self.history_flops) - self.history_flops[0]
        over_ranks = {
            "batches_per_sec": (len(self.history_samples) - 1) / seconds,
            "samples_per_sec": (self.history_samples[-1] - self.history_samples[0]) / seconds,
            **({"tokens_per_sec": tokens / seconds} if tokens > 0 else {}),
            "flops_per_sec": flops / seconds,
        }
        needed, computed, images, targets = (sum(values) for values in list(zip(*list(self.window)[1:], strict=True)))
        of_a_device = {name: value / ranks for name, value in over_ranks.items()}
        of_a_device |= {"images_per_sec": images / seconds, "answer_tokens_per_sec": targets / seconds}
        if self.gpu_flops_available:
            of_a_device["mfu"] = of_a_device["flops_per_sec"] / self.gpu_flops_available
            of_window = sum(list(self.history_flops)[1:]) / ranks
            of_a_device["hfu"] = of_window / seconds / self.gpu_flops_available * computed / needed
        rates = {f"throughput/{name}": value for name, value in over_ranks.items()}
        return rates | {f"throughput/device/{name}": value for name, value in of_a_device.items()}


def sum_over_ranks(value: float, device: Device) -> float:
    """A number of each rank, added up in single precision; a single rank's needn't go to the device."""
    total = torch.tensor(value, dtype=torch.float)
    if dist.get_world_size() > 1:
        total = device.tensor_to_device(total)
        dist.all_reduce(total)
    return total.item()


def measure_peak(device: torch.device, size: int = 8192, repetitions: int = 10) -> float:
    """Operations a second of a bf16 product of square matrices on this GPU."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    for measured in (False, True):  # once to warm up
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(repetitions if measured else 3):
            a @ a
        torch.cuda.synchronize(device)
    return 2.0 * size**3 * repetitions / (time.perf_counter() - start)
