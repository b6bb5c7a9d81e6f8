"""Before a run: does it fit, which microbatches fit, how long will it take and what will it cost.

Memory is counted from the model's sizes and from a step run without data (`step_memory.py`), work from
`composer_path/models/flops.py`. Nothing is measured on a GPU; how busy it will be (MFU) is the user's assumption.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch

from composer_path.models.execution import Checkpointing, choose_execution
from composer_path.models.flops import FlopCounter, PartFlops
from composer_path.models.path_mllm import MODULES, PathMLLM
from composer_path.planning.step_memory import RowSize, computing_in, peak_of_step, to_meta
from composer_path.weights.assembly import assemble_model

if TYPE_CHECKING:
    from omegaconf import DictConfig

# bf16 products of dense matrices, FLOP/s, from the datasheets.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
# Of a GPU's memory, for its context, NCCL's buffers and what the allocator can't use: an assumption.
RESERVED = 0.08
GPUS_A_NODE = 8
MOMENTS = {"adamw": 8.0, "adamw_8bit": 2.1}  # bytes a trained weight: two in fp32; two in 8 bits with their scales


@dataclass(frozen=True)
class SampleSize:
    """What a sample holds on average.

    Args:
        tokens: Images included.
        answers: Answer tokens.
        images: Their number.
    """

    tokens: int
    answers: int
    images: int


@dataclass(frozen=True)
class Machine:
    """GPUs to plan for.

    Args:
        gpus: Their number.
        memory: Bytes of each.
        peak: FLOP/s of each.
    """

    gpus: int
    memory: float
    peak: float


@dataclass(frozen=True)
class Standing:
    """Bytes of one GPU that stay for the whole step, and those that come and go beside activations."""

    weights: float
    gradients: float
    moments: float
    gathered: float  # blocks that are whole for the moment, and their gradients

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.moments + self.gathered


@dataclass(frozen=True)
class Fit:
    """What one kind of activation checkpointing asks for.

    Args:
        checkpointing: `off`, `selective` or `full`.
        per_token: Bytes of a row's token.
        fixed: Bytes of any row.
        most_tokens: The largest row that fits.
        recomputed: Operations done twice, as a share of what is needed.
    """

    checkpointing: str
    per_token: float
    fixed: float
    most_tokens: int
    recomputed: float


@dataclass(frozen=True)
class Plan:
    """All that a plan says; `composer_path/planning/report.py` puts it into words."""

    machine: Machine
    sample: SampleSize
    sharding: str
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
    """Bytes of a GPU's memory: `80GB` (10^9, as on datasheets) or `131GiB` (2^30).

    Raises:
        ValueError: It is no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gb|gib)", text.strip().lower())
    if match is None or not float(match[1]):
        raise ValueError(f"--gpu-memory: must be a size such as 80GB, found '{text}'")
    return float(match[1]) * (1e9 if match[2] == "gb" else 2**30)


def make_plan(config: DictConfig, machine: Machine, sample: SampleSize) -> Plan:
    """Count a run's memory and work.

    Args:
        config: From `load_config`; weights needn't be there, the language model's `config.json` must.
        machine: What it should run on.
        sample: What its samples hold on average.

    Raises:
        ValueError: The samples can't be, or the model can't be built.
    """
    from composer_path.config.reading import plain

    settings = plain(config)
    parallelism = settings["trainer"].get("parallelism_config") or {}
    fsdp = parallelism.get("fsdp")
    model = _empty_model(settings, "off")
    if sample.answers >= sample.tokens - sample.images * model.num_image_tokens():
        raise ValueError(
            f"a sample of {sample.tokens} tokens has no room for {sample.answers} answer tokens and {sample.images} "
            f"images of {model.num_image_tokens()} tokens each"
        )
    counter = FlopCounter(model)
    lengths = ([sample.tokens], sample.images, sample.answers)
    flops = counter.needed(*lengths)
    sizes: dict[str, tuple[int, bool]] = {name: _size(getattr(model, name)) for name in MODULES}
    standing = standing_bytes(model, fsdp, settings["optimizer"]["name"], machine.gpus)
    free = machine.memory * (1 - RESERVED) - standing.total
    loss_chunk = settings["execution"].get("loss_chunk")
    fits = []
    for kind in get_args(Checkpointing):
        per_token, fixed = bytes_of_rows(_empty_model(settings, kind), sample)
        most = int((free - fixed) / per_token) if free > fixed else 0
        again = counter.recomputed(*lengths, blocks=kind == "full", head=loss_chunk is not None)
        fits.append(Fit(kind, per_token, fixed, most, again / flops.total))
    loader = settings["train_loader"]
    chosen = settings["execution"].get("activation_checkpointing", "off") or "off"
    trained = sum(count for count, learns in sizes.values() if learns)
    everything = sum(count * (4.0 if learns else 2.0) for count, learns in sizes.values())
    only_projector = all(name == "projector" for name, (_, learns) in sizes.items() if learns)
    return Plan(
        machine=machine,
        sample=sample,
        sharding="DDP" if fsdp is None else f"FSDP{fsdp.get('version', 2)}",
        parameters=sizes,
        standing=standing,
        fits=fits,
        flops=flops,
        global_batch_size=loader["global_batch_size"],
        max_tokens=loader.get("max_tokens_per_microbatch"),
        max_seq_len=loader["dataset"].get("max_seq_len", 4096),
        chosen=chosen,
        host_bytes=sizes["projector"][0] * 4.0 if only_projector else everything,
        checkpoint_bytes=trained * (4 + MOMENTS[settings["optimizer"]["name"]]),
    )


def _empty_model(settings: Mapping[str, Any], checkpointing: str) -> PathMLLM:
    """The configured model without content, to be run with one kind of checkpointing."""
    model = assemble_model(**settings["model"], seed=0, frozen_dtype=torch.bfloat16, empty=True)
    execution = {key: value for key, value in settings["execution"].items() if key != "fusion"}
    return choose_execution(to_meta(model), **execution | {"activation_checkpointing": checkpointing})


def _size(module: torch.nn.Module) -> tuple[int, bool]:
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), any(p.requires_grad for p in parameters)


def bytes_of_rows(model: PathMLLM, sample: SampleSize) -> tuple[float, float]:
    """Peak of a step in bf16, by the token and whatever the row: a straight line through two rows."""
    few = max(1, 2048 // sample.tokens)
    with computing_in(model, torch.bfloat16):
        first, second = (
            peak_of_step(model, RowSize(number, sample.tokens, sample.answers, sample.images))
            for number in (few, 2 * few)
        )
    per_token = (second - first) / (few * sample.tokens)
    return per_token, max(0.0, first - per_token * few * sample.tokens)


def standing_bytes(model: PathMLLM, fsdp: Mapping[str, Any] | None, optimizer: str, gpus: int) -> Standing:
    """Bytes of one GPU beside activations: fp32 for what learns, bf16 for what is frozen.

    Under FSDP a block is gathered while the one before it still computes; both, and the root (embeddings, final norm,
    head), are whole in bf16. Gradients of such a pair are whole in bf16, and once more in fp32 for their reduction.
    """
    shards = 1 if fsdp is None else min(gpus, GPUS_A_NODE) if "HYBRID" in str(fsdp.get("sharding_strategy")) else gpus
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    if fsdp is None:  # autocast keeps a bf16 copy of each weight it has used
        return Standing(4.0 * trained + 2.0 * frozen, 4.0 * trained, MOMENTS[optimizer] * trained, 2.0 * trained)
    units = _units(model)
    root, blocks = units[0], sorted(units[1:], reverse=True)
    if fsdp.get("reshard_after_forward", True):
        whole = root[0] + sum(count for count, _ in blocks[:2])
    else:
        whole = root[0] + sum(count for count, _ in blocks)
    reduced = root[1] + max((learning for _, learning in blocks), default=0)
    return Standing(
        weights=(4.0 * trained + 2.0 * frozen) / shards,
        gradients=4.0 * trained / shards,
        moments=MOMENTS[optimizer] * trained / shards,
        gathered=2.0 * whole + (2.0 + 4.0) * reduced,
    )


def _units(model: PathMLLM) -> list[tuple[int, int]]:
    """Weights, and those that learn, of each FSDP unit; what is left over, the root, comes first."""
    units, taken = [], set()
    # Innermost first: what a block holds isn't its encoder's.
    for module in reversed([module for module in model.modules() if model.fsdp_wrap_fn(module)]):
        own = [p for p in module.parameters() if p not in taken]
        taken.update(own)
        units.append((sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad)))
    left = [p for p in model.parameters() if p not in taken]
    return [(sum(p.numel() for p in left), sum(p.numel() for p in left if p.requires_grad)), *units]
