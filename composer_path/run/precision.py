"""Device and precision: the dtype of matrix products and of frozen weights, and what a CPU can do of the YAML's.

`trainer.precision` picks it (`amp_bf16`; every YAML says it), or `param_dtype` of FSDP's `mixed_precision`, if given.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from composer.utils import dist

log = logging.getLogger(__name__)


def compute_dtype(precision: str, section: Mapping[str, Any] | None) -> torch.dtype:
    """The dtype in which matrix products run, which is also the one frozen weights are held in."""
    mixed = section["fsdp"]["mixed_precision"] if section and section["fsdp"] else None
    named = mixed.get("param_dtype") if isinstance(mixed, Mapping) else "fp32" if mixed == "FULL" else None
    return torch.bfloat16 if (named or precision) in ("bf16", "amp_bf16") else torch.float32


def require_device(name: str | None) -> None:
    """Refuse a GPU that isn't there; ValueError."""
    found, rank = torch.cuda.device_count() if torch.cuda.is_available() else 0, dist.get_local_rank()
    if (name == "gpu" and not found) or (name != "cpu" and 0 < found <= rank):
        rule = f"trainer.device: rank {dist.get_global_rank()} needs a GPU of its own; found {found} on this machine"
        raise ValueError(f"{rule}; start as many ranks as there are GPUs, or take trainer.device=cpu")


def settle_precision(trainer: dict[str, Any], device_type: str) -> None:
    """Change a Trainer section so that bf16 training also starts on a CPU, where Composer only takes fp32.

    With FSDP2 products are still computed in bf16, by its mixed precision; without it in fp32. Either is said.
    """
    if device_type != "cpu" or trainer["precision"] != "amp_bf16":
        return
    trainer["precision"] = "fp32"
    fsdp = (trainer["parallelism_config"] or {"fsdp": None})["fsdp"]
    if fsdp is not None and fsdp["mixed_precision"] in ("DEFAULT", "PURE"):
        reduce = "bf16" if fsdp["mixed_precision"] == "PURE" else "fp32"
        fsdp["mixed_precision"] = {"param_dtype": "bf16", "reduce_dtype": reduce}
    how = "bf16 through FSDP's mixed precision" if fsdp is not None else "fp32"
    log.warning("trainer.precision: amp_bf16 needs a GPU; this CPU run computes in %s", how)


def held_as(settings: Mapping[str, Any]) -> dict[str, Any]:
    """How this rank holds the model, as keywords of `assemble_model`, from a configuration with settled precision.

    Frozen parts are held in the compute dtype; ranks to which FSDP sends rank 0's weights start empty.
    """
    trainer = settings["trainer"]
    section = trainer["parallelism_config"]
    return {
        "seed": settings["seed"],
        "frozen_dtype": compute_dtype(trainer["precision"], section),
        "empty": bool(section and section["fsdp"]) and dist.get_global_rank() != 0,
    }
