"""What one rank of many holds of a model that has no content: `python fake_ranks.py CASES.json OUT.json`.

torch's fake process group lets one process be any rank of any number; nothing is sent. The model is sharded by
Composer's own State and FSDP2, on the mesh that the YAML asks for.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from composer.core import Precision, State
from composer.devices import DeviceCPU
from composer.distributed.fsdp2 import prepare_fully_shard
from composer.distributed.fsdp2_utils import generate_composer_model_policy
from composer.utils.parallelism import ParallelismConfig
from four_ranks import give_events_to_cpus
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from composer_path import ComposerPathMLLM
from composer_path.config.reading import load_config, plain
from composer_path.run.precision import held_as
from composer_path.run.sharding import build_parallelism_config
from composer_path.weights.assembly import assemble_model


def held_by(yaml: str, overrides: list[str], ranks: int, rank: int) -> dict[str, Any]:
    """Units, and of each parameter what this rank holds."""
    os.environ |= {"WORLD_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank % 8), "LOCAL_WORLD_SIZE": "8"}
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        started = time.process_time()
        settings = plain(load_config(yaml, overrides))
        config: Any = build_parallelism_config(settings["trainer"]["parallelism_config"])
        model = assemble_model(**settings["model"], **held_as(settings) | {"empty": True})
        adapter = ComposerPathMLLM(model)
        parallelism = ParallelismConfig(fsdp2=config["fsdp"])
        State(
            rank_zero_seed=0, run_name="fake", model=adapter, device=DeviceCPU(), parallelism_config=parallelism
        )  # makes the mesh
        mesh = config["fsdp"].device_mesh
        whole = {name: (parameter.numel(), str(parameter.dtype)) for name, parameter in model.named_parameters()}
        policy = generate_composer_model_policy(adapter)
        prepare_fully_shard(adapter, config["fsdp"], Precision.AMP_BF16, policy)
        units = {}
        for name, module in adapter.named_modules():
            if isinstance(module, FSDPModule):
                group = module._get_fsdp_state()._fsdp_param_group  # type: ignore[attr-defined]
                own = group.fsdp_params if group is not None else []
                units[name] = {
                    "parameters": sum(one.sharded_param.numel() for one in own),
                    "dtypes": sorted({str(one.sharded_param.dtype) for one in own}),
                    "computes_in": sorted({str(one.mp_policy.param_dtype) for one in own}),
                    "reduces_in": sorted({str(one.mp_policy.reduce_dtype) for one in own}),
                }
        sharded: dict[str, Any] = dict(model.named_parameters())
        parameters = {
            name: [*whole[name], sharded[name].to_local().numel(), sharded[name].requires_grad, sharded[name].shape[0]]
            for name in whole
        }
        placements = sorted({str(parameter.placements) for parameter in sharded.values()})
        return {
            "mesh": list(mesh.mesh.shape),
            "row": mesh.mesh.reshape(-1, mesh.mesh.shape[-1])[rank // mesh.mesh.shape[-1]].tolist(),
            "placements": placements,
            "units": units,
            "parameters": parameters,
            "seconds": time.process_time() - started,
        }
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    give_events_to_cpus()
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps([held_by(*case) for case in cases]), encoding="utf-8")
