"""Before a run: does it fit, which microbatches fit, how long will it take and what will it cost.

Memory is counted from the model's sizes and from a step run without data (`step_memory.py`), work from
`composer_path/models/flops.py`. Nothing is measured on a GPU; how busy it will be (MFU) is the user's assumption.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch

from composer_path.config.reading import plain
from composer_path.models.execution import Checkpointing, choose_execution
from composer_path.models.flops import FlopCounter, PartFlops
from composer_path.models.path_mllm import PathMLLM
from composer_path.models.pattern import MODULES
from composer_path.planning.gpu_share import (
    MOMENTS,
    Standing,
    Traffic,
    replicas_and_shards,
    size_of,
    standing_bytes,
    traffic_of_step,
)
from composer_path.planning.step_memory import RowSize, computing_in, peak_of_step, to_meta
from composer_path.weights.assembly import assemble_model

if TYPE_CHECKING:
    from omegaconf import DictConfig

# bf16 products of dense matrices, FLOP/s, from the datasheets.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
# Of a GPU's memory, for its context, NCCL's buffers and what the allocator can't use: an assumption.
RESERVED = 0.08
FEW_SAMPLES = 8  # of a GPU in a step; with fewer, balancing has little to exchange and ranks wait for the longest


@dataclass(frozen=True)
class SampleSize:
    """What a sample holds on average."""

    tokens: int  # images included
    answers: int  # tokens of them
    images: int


@dataclass(frozen=True)
class Machine:
    """GPUs to plan for."""

    gpus: int
    memory: float  # bytes of each
    peak: float  # FLOP/s of each


@dataclass(frozen=True)
class Fit:
    """What one kind of activation checkpointing asks for."""

    checkpointing: str
    per_token: float  # bytes of a row's token
    fixed: float  # bytes of any row
    most_tokens: int  # of the largest row that fits
    recomputed: float  # operations done twice, as a share of what is needed


@dataclass(frozen=True)
class Plan:
    """All that a plan says; `composer_path/planning/report.py` puts it into words."""

    machine: Machine
    sample: SampleSize
    sharding: str
    replicas: int
    traffic: Traffic
    parameters: dict[str, tuple[int, bool]]
    standing: Standing
    fits: list[Fit]
    flops: PartFlops
    global_batch_size: int
    max_tokens: int | None
    max_seq_len: int
    chosen: str
    host_bytes: float
    checkpoint_bytes: float

    @property
    def chosen_fit(self) -> Fit:
        """Of the kind that the YAML asks for."""
        return next(fit for fit in self.fits if fit.checkpointing == self.chosen)

    @property
    def fitting(self) -> bool:
        """Whether the YAML's microbatches fit."""
        return self.chosen_fit.most_tokens >= self.wanted_tokens

    @property
    def problem(self) -> str | None:
        """Why so many GPUs can't share the batch; the run would be refused at its start."""
        batch, gpus = self.global_batch_size, self.machine.gpus
        if batch % gpus == 0:
            return None
        found = f"global_batch_size {batch} " + (
            f"is less than the {gpus} GPUs" if batch < gpus else f"isn't shared evenly by {gpus} GPUs"
        )
        fitting = [count for count in range(1, batch + 1) if batch % count == 0]
        return f"{found}: take {max(count for count in fitting if count <= gpus)} of them, or another batch"

    @property
    def warning(self) -> str | None:
        """What is against so many GPUs, though they can run."""
        samples, gpus = self.global_batch_size // self.machine.gpus, self.machine.gpus
        if self.problem is not None or samples >= FEW_SAMPLES or gpus == 1:
            return None
        found = f"{samples} sample{'s' if samples > 1 else ''} a GPU in a step"
        why = "GPUs wait for the one with the longest samples, and rows are short"
        return f"{found}: {why}; {max(1, self.global_batch_size // FEW_SAMPLES)} GPUs or fewer hold {FEW_SAMPLES}"

    @property
    def wanted_tokens(self) -> int:
        """What the YAML's microbatch may hold; without a limit, what the GPU's share of a batch holds on average."""
        share = self.global_batch_size * self.sample.tokens // self.machine.gpus
        return self.max_tokens if self.max_tokens is not None else max(share, self.max_seq_len)

    @property
    def best(self) -> Fit | None:
        """The kind that keeps most of those that compute least twice, or the one with the largest rows.

        Only kinds in which the longest sample fits; the first choice is one in which the YAML's microbatches do.
        """
        fitting = [fit for fit in self.fits if fit.most_tokens >= max(self.max_seq_len, self.sample.tokens)]
        least = [fit for fit in fitting if fit.recomputed == min(other.recomputed for other in fitting)]
        wide = [fit for fit in least if fit.most_tokens >= self.wanted_tokens]
        return wide[0] if wide else max(least, key=lambda fit: fit.most_tokens, default=None)


def parse_memory(text: str) -> float:
    """Bytes of a GPU's memory: `80GB` (10^9, as on datasheets) or `131GiB` (2^30)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gb|gib)", text.strip().lower())
    if match is None or not float(match[1]):
        raise ValueError(f"--gpu-memory: must be a size such as 80GB, found '{text}'")
    return float(match[1]) * (1e9 if match[2] == "gb" else 2**30)


def make_plan(config: DictConfig, machine: Machine, sample: SampleSize) -> Plan:
    """Count a run's memory and work. Weights needn't be there; the language model's `config.json` must.

    Raises:
        ValueError: The samples can't be, the model can't be built, or sharding doesn't fit the GPUs.
    """
    settings = plain(config)
    parallelism, optimizer = settings["trainer"]["parallelism_config"], settings["optimizer"]["name"]
    fsdp = parallelism and parallelism["fsdp"]
    model = _empty_model(settings, "off")
    if sample.answers >= sample.tokens - sample.images * model.num_image_tokens():
        raise ValueError(
            f"a sample of {sample.tokens} tokens has no room for {sample.answers} answer tokens and {sample.images} "
            f"images of {model.num_image_tokens()} tokens each"
        )
    counter = FlopCounter(model)
    lengths = ([sample.tokens], sample.images, sample.answers)
    flops = counter.needed(*lengths)
    counts: dict[str, tuple[int, int]] = {name: size_of(list(getattr(model, name).parameters())) for name in MODULES}
    sizes = {name: (count, learning > 0) for name, (count, learning) in counts.items()}
    replicas, shards = replicas_and_shards(fsdp, machine.gpus)
    standing = standing_bytes(model, fsdp, optimizer, shards)
    free = machine.memory * (1 - RESERVED) - standing.total
    fits, loader, execution = [], settings["train_loader"], settings["execution"]
    for kind in get_args(Checkpointing):
        per_token, fixed = bytes_of_rows(model if kind == "off" else _empty_model(settings, kind), sample)
        most = int((free - fixed) / per_token) if free > fixed else 0
        again = counter.recomputed(*lengths, blocks=kind == "full", head=execution["loss_chunk"] is not None)
        fits.append(Fit(kind, per_token, fixed, most, again / flops.total))
    trained = sum(count for count, learns in sizes.values() if learns)
    everything = sum(count * (4.0 if learns else 2.0) for count, learns in sizes.values())
    only_projector = all(name == "projector" for name, (_, learns) in sizes.items() if learns)
    return Plan(
        machine=machine,
        sample=sample,
        sharding="DDP" if fsdp is None else f"FSDP{fsdp['version']}",
        replicas=replicas,
        traffic=traffic_of_step(counts, fsdp, replicas, shards),
        parameters=sizes,
        standing=standing,
        fits=fits,
        flops=flops,
        global_batch_size=loader["global_batch_size"],
        max_tokens=loader["max_tokens_per_microbatch"],
        max_seq_len=loader["dataset"]["max_seq_len"],
        chosen=execution["activation_checkpointing"] or "off",  # a bare off is false to YAML
        host_bytes=sizes["projector"][0] * 4.0 if only_projector else everything,
        checkpoint_bytes=trained * (4 + MOMENTS[optimizer]),
    )


def _empty_model(settings: Mapping[str, Any], checkpointing: str) -> PathMLLM:
    """The configured model without content, to be run with one kind of checkpointing."""
    model = assemble_model(**settings["model"], seed=0, frozen_dtype=torch.bfloat16, empty=True)
    execution = {key: value for key, value in settings["execution"].items() if key != "fusion"}
    return choose_execution(to_meta(model), **execution | {"activation_checkpointing": checkpointing})


def bytes_of_rows(model: PathMLLM, sample: SampleSize) -> tuple[float, float]:
    """Peak of a step in bf16, by the token and whatever the row: a straight line through two rows."""
    few = max(1, 2048 // sample.tokens)
    with computing_in(model, torch.bfloat16):
        rows = (RowSize(samples, *dataclasses.astuple(sample)) for samples in (few, 2 * few))
        first, second = (peak_of_step(model, row) for row in rows)
    per_token = (second - first) / (few * sample.tokens)
    return per_token, max(0.0, first - per_token * few * sample.tokens)
