"""What all runs share, made once: the language model's random weights, the sets, and what `plan` says of this card."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.sets import TOKENIZER, write_stage_set
from benchmarks.gpu.variants import BATCH, BATCH_TINY, LLAMA_7B, LLAMA_TINY, REPOSITORY, YAMLS, overrides
from composer_path.config.reading import load_config
from composer_path.models.language_model import untrained_language_model
from composer_path.planning.plan import PEAK_FLOPS, RESERVED, Machine, make_plan

PRETENDED_MEMORY = 8e9  # of a machine without a GPU


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Write weights, sets and plans; the result is also left in the scratch folder, for later calls.

    Args:
        task: `scratch`, `tiny`, `stages`, `steps` (of a run).
    """
    scratch, tiny = Path(task["scratch"]), task["tiny"]
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not tiny:
        raise RuntimeError("there is no GPU; --tiny runs on a CPU what a CPU can run")
    name = torch.cuda.get_device_name() if has_gpu else None
    memory = float(torch.cuda.get_device_properties(0).total_memory) if has_gpu else PRETENDED_MEMORY
    peak = next((flops for key, flops in PEAK_FLOPS.items() if key in (name or "")), None)
    start = time.perf_counter()
    config = LLAMA_TINY if tiny else LLAMA_7B
    language_model = write_language_model(scratch / "language_model", config, "cuda" if has_gpu else "cpu")
    prepared: dict[str, Any] = {
        "gpu": name,
        "tiny": tiny,
        "memory": memory,
        "reserved": RESERVED,
        "peak": peak,
        "vocabulary": config["vocab_size"],
        "weights_s": round(time.perf_counter() - start, 1),
        "stages": {},
    }
    for stage in task["stages"]:
        records = (BATCH_TINY if tiny else BATCH[stage]) * task["steps"]
        size, shorter = (64, 8) if tiny else (448, 1)
        shards, sample = write_stage_set(scratch / "sets", YAMLS[stage], records, size, shorter)
        places = {
            "save_root": str(scratch / "runs"),
            "shards": str(shards),
            "language_model": str(language_model),
            "tokenizer": str(TOKENIZER),
        }
        words = overrides(stage, tiny, places, task["steps"])
        machine = Machine(gpus=1, memory=memory, peak=peak or 1.0)
        plan = make_plan(load_config(REPOSITORY / "yamls" / f"{YAMLS[stage]}.yaml", words), machine, sample)
        prepared["stages"][stage] = {
            "places": places,
            "tokens": sample.tokens,
            "needed_tflop_a_sample": plan.flops.total / 1e12,
            "trained": sum(count for count, learns in plan.parameters.values() if learns),
            "frozen": sum(count for count, learns in plan.parameters.values() if not learns),
            "standing": plan.standing.total,
            "free": memory * (1 - RESERVED) - plan.standing.total,
            "fits": {fit.checkpointing: vars(fit) for fit in plan.fits},
            "checkpoint_bytes": plan.checkpoint_bytes,
        }
    (scratch / "prepared.json").write_text(json.dumps(prepared, indent=2))
    return prepared


def write_language_model(folder: Path, config: dict[str, Any], device: str) -> Path:
    """Random weights in bf16, drawn on the device; a folder that is complete is taken."""
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        torch.manual_seed(17)
        with torch.device(device):
            model = untrained_language_model(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        (folder / "complete").touch()
    return folder


def plan_of(peak_bytes: float | None, largest_row: int, facts: dict[str, Any], checkpointing: str) -> dict[str, Any]:
    """Measured peak memory beside what `plan` says of a step with such a row."""
    fit = facts["fits"][checkpointing]
    planned = facts["standing"] + fit["fixed"] + fit["per_token"] * largest_row
    return {
        "planned_memory_gb": planned / 1e9,
        "memory_over_plan": peak_bytes / planned if peak_bytes is not None else None,
    }
