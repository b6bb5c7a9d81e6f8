"""What is noted of a run: losses, the first step's gradients, and the time of all steps but the first ones.

The device is waited for twice only, where the measured time begins and where it ends, so that a trainer that doesn't
wait between its steps isn't made to.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.gpu.ceilings import wait_for_device
from composer_path.batches.batch import Batch
from composer_path.models.flops import FlopCounter
from composer_path.models.path_mllm import PathMLLM

ENTRIES = 64  # of each gradient that is compared


class Clock:
    """Notes steps as they end.

    Args:
        steps: Of the run.
        skip: First ones, at least one, that aren't measured.
    """

    def __init__(self, steps: int, skip: int) -> None:
        self.steps, self.skip = steps, skip
        self.losses: list[Any] = []
        self.gradients: dict[str, Any] = {}
        self.largest_row = 0
        self.samples = self.tokens = 0
        self.needed = self.start = self.end = 0.0

    def note_gradients(self, model: PathMLLM) -> None:
        """Gradients are complete; those of the first step are kept."""
        if not self.gradients:
            self.gradients = gradient_sample(model)

    def note(self, loss: Any, flops: FlopCounter, batch: Batch) -> None:
        """A step has ended; its loss isn't waited for."""
        self.losses.append(loss.detach().clone() if isinstance(loss, Tensor) else loss)
        lengths, num_images, num_targets = batch.sizes()
        first = 0
        for count in batch.samples_per_bin:
            self.largest_row = max(self.largest_row, sum(lengths[first : first + count]))
            first += count
        if len(self.losses) > self.skip:
            self.samples, self.tokens = self.samples + len(lengths), self.tokens + sum(lengths)
            self.needed += flops.needed(lengths, num_images, num_targets).total
        if len(self.losses) in (self.skip, self.steps):
            wait_for_device()
            now = time.perf_counter()
            self.start, self.end = (now, now) if len(self.losses) == self.skip else (self.start, now)

    def report(self) -> dict[str, Any]:
        """Rates, losses and gradients.

        Raises:
            RuntimeError: The run ended early.
        """
        if len(self.losses) != self.steps:
            raise RuntimeError(f"the run ended after {len(self.losses)} of {self.steps} steps")
        elapsed = self.end - self.start
        gpu = torch.cuda.is_available()
        return {
            "samples_per_s": self.samples / elapsed,
            "tokens_per_s": self.tokens / elapsed,
            "needed_tflops": self.needed / elapsed / 1e12,
            "measured_steps": self.steps - self.skip,
            "losses": [float(loss) for loss in self.losses],
            "gradients": self.gradients,
            "largest_row": self.largest_row,
            "peak_bytes": torch.cuda.max_memory_allocated() if gpu else None,
            "reserved_bytes": torch.cuda.max_memory_reserved() if gpu else None,
        }


def watched_weights(parameters: Mapping[str, Tensor]) -> list[str]:
    """The projector's matrices, and of the language model's first and last block those of keys and of the MLP."""
    of_blocks = [name for name in parameters if ".layers." in name and "language_model" in name]
    wanted = [name for name in of_blocks if name.endswith(("k_proj.weight", "down_proj.weight"))]
    numbers = {name: int(name.partition(".layers.")[2].partition(".")[0]) for name in wanted}
    ends = {min(numbers.values(), default=0), max(numbers.values(), default=0)}
    projector = [name for name, p in parameters.items() if name.startswith("projector.") and p.ndim > 1]
    return [*projector, *(name for name in wanted if numbers[name] in ends)]


def gradient_sample(model: PathMLLM) -> dict[str, Any]:
    """The norm of all gradients, and of some weights the norm and entries at random places."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    watched = {}
    for name in watched_weights(gradients):
        flat = whole(gradients[name]).flatten()
        places = torch.randint(len(flat), (ENTRIES,), generator=torch.Generator().manual_seed(len(flat)))
        entries = flat[places.to(flat.device)].float().tolist()
        watched[name] = {"norm": norm_of([flat]), "entries": [float(f"{entry:.6g}") for entry in entries]}
    return {"norm": norm_of(map(whole, gradients.values())), "of": watched}


def norm_of(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm of all entries."""
    return float(sum(tensor.float().square().sum().double() for tensor in tensors)) ** 0.5


def whole(gradient: Tensor) -> Tensor:
    """A gradient as an ordinary tensor; on one GPU the shard is all of it."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
