"""How the model is spread over ranks: Composer's FSDP2 (default), whole or in replicas, FSDP1 or DDP, from the YAML."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config, FSDPConfig

# Where FSDP1 of this project differs from Composer's: ranks that start empty get rank 0's weights.
FSDP1_DEFAULTS = {"sync_module_states": True}
SECTION = "trainer.parallelism_config.fsdp"


@dataclass
class HybridFSDP2Config(FSDP2Config):
    """Composer's FSDP2, which can also keep several replicas of the model, each sharded over some of the ranks (HSDP).

    Composer makes the mesh from these two, which its own class answers with constants; a second dimension of the mesh
    is what `fully_shard` takes for replicas.

    Args:
        data_parallel_replicate_degree: How many replicas; None for one.
        data_parallel_shard_degree: Over how many ranks each of them is sharded; -1 for all that there are.
    """

    data_parallel_replicate_degree: int | None = None
    data_parallel_shard_degree: int = -1
    # Composer takes a mapping of dtypes too, which its annotation doesn't say.
    mixed_precision: str | Mapping[str, str] = FSDP2Config.mixed_precision  # type: ignore[assignment]


def mesh_degrees(fsdp: Mapping[str, Any], ranks: int) -> tuple[int, int]:
    """Replicas of the model, and ranks that each of them is sharded over.

    Raises:
        ValueError: They don't fit the number of ranks.
    """
    replicas = fsdp["data_parallel_replicate_degree"] or 1
    shards = fsdp["data_parallel_shard_degree"]
    if shards == -1 and ranks % replicas:
        fitting = [str(number) for number in range(1, ranks + 1) if ranks % number == 0]
        found = f"found {replicas}, but {ranks} rank{'s' if ranks > 1 else ''} can't be divided into so many replicas"
        raise ValueError(f"{SECTION}.data_parallel_replicate_degree: {found}; take {_one_of(fitting)}")
    if shards != -1 and replicas * shards != ranks:
        found = f"{replicas} replica{'s' if replicas > 1 else ''} of {shards} ranks each are {replicas * shards}"
        fix = "leave it out, and it is what the ranks allow, or start as many ranks"
        raise ValueError(f"{SECTION}.data_parallel_shard_degree: {found}, found {ranks} in this run; {fix}")
    return replicas, ranks // replicas


def _one_of(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def check_fsdp1() -> None:
    """Raise ValueError where this torch is too new for FSDP1, which torch deprecates from 2.8 on."""
    if torch.__version__ >= "2.8":  # torch's own type, which compares versions
        found = f"1 (FSDP1) is for torch 2.7, found torch {torch.__version__}"
        raise ValueError(f"{SECTION}.version: {found}; use version: 2, or null as fsdp for DDP")


def build_parallelism_config(section: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Composer's `parallelism_config` from the YAML's (None is DDP).

    Raises:
        ValueError: FSDP1 with a torch that is too new for it, or without a GPU; degrees that don't fit the ranks.
    """
    if not section or section["fsdp"] is None:
        return None
    fsdp = dict(section["fsdp"])
    replicas, shards = mesh_degrees(fsdp, dist.get_world_size())
    if replicas > 1:
        fsdp["data_parallel_shard_degree"] = shards
        if _events_missing():
            found = f"found {replicas}, which torch {torch.__version__} can't on a CPU"
            raise ValueError(f"{SECTION}.data_parallel_replicate_degree: {found}; leave it out here")
    else:  # one dimension then
        fsdp |= {"data_parallel_replicate_degree": None, "data_parallel_shard_degree": -1}
    if fsdp.pop("version") == 2:
        with warnings.catch_warnings():  # "experimental": this project pins the version and tests it
            warnings.simplefilter("ignore", UserWarning)
            return {"fsdp": HybridFSDP2Config(**fsdp)}
    check_fsdp1()
    if not torch.cuda.is_available():
        fix = "use version: 2 here, or leave the section out for DDP"
        raise ValueError(f"{SECTION}.version: 1 needs a CUDA device; {fix}")
    return {"fsdp": FSDPConfig(**fsdp, state_dict_type="sharded")}  # each writes its own part of a checkpoint


def _events_missing() -> bool:
    """Whether this torch's FSDP2 waits for events of a stream that CPUs don't have."""
    on_cpu = not torch.cuda.is_available()
    return on_cpu and torch.__version__ < "2.8" and torch.cpu.current_stream().record_event() is None  # type: ignore


def mend_gloo_averaging() -> bool:
    """Make FSDP2 average gradients on gloo, where torch 2.7 sums them.

    gloo's reduce-scatter takes `ReduceOp.AVG` and returns the sum (torch issue 162338): gradients come out times the
    number of ranks, which AdamW hides. A two-element reduce-scatter tells whether this torch does so; if it does (which
    is returned), FSDP2 is told to divide by itself.

    Raises:
        RuntimeError: The fault is there, but this torch doesn't have the function that the cure replaces.
    """
    world_size = dist.get_world_size()
    if world_size == 1 or torch.distributed.get_backend() != "gloo":
        return False
    output = torch.zeros(1)
    torch.distributed.reduce_scatter_tensor(output, torch.ones(world_size), op=torch.distributed.ReduceOp.AVG)
    if output.item() == 1.0:
        return False
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

    original: Any = getattr(collectives, "_get_gradient_divide_factors", None)
    found = list(inspect.signature(original).parameters) if original is not None else []
    expected = ["reduce_scatter_group", "all_reduce_group", "reduce_dtype", "device_type"]
    later = [*expected, "factor", "force_sum_reduction_for_comms"]  # can be told to
    if found not in (expected, later):
        raise RuntimeError(
            f"gloo sums gradients instead of averaging them in torch {torch.__version__}, and the known cure does not "
            "fit this version; use NCCL on GPUs, a single rank, or DDP"
        )

    @functools.wraps(original)
    def sum_and_divide(*arguments: Any, **keywords: Any) -> Any:
        bound = inspect.signature(original).bind(*arguments, **keywords)
        if found == later:
            bound.arguments["force_sum_reduction_for_comms"] = True
            return original(*bound.args, **bound.kwargs)
        groups = [bound.arguments["reduce_scatter_group"], bound.arguments["all_reduce_group"]]
        return 1.0, float(math.prod(group.size() for group in groups if group is not None))

    collectives._get_gradient_divide_factors = sum_and_divide
    return True
