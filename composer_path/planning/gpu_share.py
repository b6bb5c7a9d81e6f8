"""What one GPU has of a run beside activations, by how the model is spread: bytes that it holds and that it sends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from composer_path.models.path_mllm import PathMLLM
from composer_path.models.rounded_linear import num_weights
from composer_path.run.sharding import mesh_degrees

GPUS_A_NODE = 8
MOMENTS = {"adamw": 8.0, "adamw_8bit": 2.1}  # bytes a trained weight: two in fp32; two in 8 bits with their scales


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
class Traffic:
    """Bytes that one GPU sends in a step of one microbatch, by rings: to those that share its replica, and to others.

    Under FSDP each further microbatch sends them again.
    """

    within: float  # gathering weights, scattering gradients
    between: float  # adding gradients up over replicas


def size_of(parameters: list[torch.nn.Parameter]) -> tuple[int, int]:
    """Weights, and those that learn."""
    return sum(map(num_weights, parameters)), sum(num_weights(p) for p in parameters if p.requires_grad)


def replicas_and_shards(fsdp: Mapping[str, Any] | None, gpus: int) -> tuple[int, int]:
    """How many times the model is there, and over how many GPUs each of them is sharded; 1 for DDP."""
    if fsdp is None:
        return gpus, 1
    replicas, shards = mesh_degrees(fsdp, gpus)
    if replicas == 1 and fsdp["version"] == 1 and "HYBRID" in fsdp["sharding_strategy"]:  # FSDP1 knows nodes itself
        shards = min(gpus, GPUS_A_NODE)
    return gpus // shards, shards


def traffic_of_step(
    counts: Mapping[str, tuple[int, int]], fsdp: Mapping[str, Any] | None, replicas: int, shards: int
) -> Traffic:
    """What a GPU sends: weights in bf16 for the forward pass, and for the backward pass again where it freed them.

    Gradients are scattered inside a replica and added up over replicas, both in fp32. No gradient passes a frozen
    vision encoder, so that it is gathered once.
    """
    trained = sum(learning for _, learning in counts.values())
    gathered = float(sum(count for count, _ in counts.values()))
    if fsdp is not None and (fsdp["version"] == 1 or fsdp["reshard_after_forward"]):
        gathered += sum(count for name, (count, learns) in counts.items() if learns or name != "vision_encoder")
    within = (2.0 * gathered + 4.0 * trained) * (shards - 1) / shards
    return Traffic(within, 2.0 * 4.0 * trained / shards * (replicas - 1) / replicas)


def standing_bytes(model: PathMLLM, fsdp: Mapping[str, Any] | None, optimizer: str, shards: int) -> Standing:
    """Bytes of one GPU beside activations: fp32 for what learns, bf16 for what is frozen (less where rounded).

    Under FSDP a block is gathered while the one before it still computes; both, and the root (embeddings, final norm,
    head), are whole in bf16. Gradients of such a pair are whole in bf16, and once more in fp32 for their reduction.
    """
    count, trained = size_of(list(model.parameters()))
    rounded = [parameter for parameter in model.parameters() if parameter.dtype == torch.uint8]
    saved = sum(2.0 * num_weights(parameter) - parameter.numel() for parameter in rounded)
    spread = 4.0 * trained + 2.0 * (count - trained) - saved, 4.0 * trained, MOMENTS[optimizer] * trained
    if fsdp is None:  # autocast keeps a bf16 copy of each weight it has used
        return Standing(*spread, 2.0 * trained)
    root, *blocks = _units(model)
    largest = sorted(blocks, reverse=True)
    whole = largest if fsdp["version"] == 2 and not fsdp["reshard_after_forward"] else largest[:2]
    reduced = root[1] + max((learning for _, learning in blocks), default=0)
    gathered = 2.0 * (root[0] + sum(count for count, _ in whole)) + (2.0 + 4.0) * reduced
    weights, gradients, moments = (size / shards for size in spread)
    return Standing(weights, gradients, moments, gathered)


def _units(model: PathMLLM) -> list[tuple[int, int]]:
    """Sizes of each FSDP unit; what is left over, the root, comes first."""
    units: list[tuple[int, int]] = []
    taken: set[torch.nn.Parameter] = set()
    # Innermost first: what a block holds isn't its encoder's.
    for module in reversed([model, *(module for module in model.modules() if model.fsdp_wrap_fn(module))]):
        own = [p for p in module.parameters() if p not in taken]
        taken.update(own)
        units.insert(0, size_of(own))
    return units
