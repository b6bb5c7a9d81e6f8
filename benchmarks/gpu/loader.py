"""Our loader alone: whether it keeps up with the GPU."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.ceilings import wait_for_device
from composer_path.config.reading import load_config, plain
from composer_path.records.vocabulary import load_tokenizer
from composer_path.train import build_loader
from composer_path.weights.assembly import assemble_model


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Samples a second of a set's second pass, rows made and on the device; workers start in the first.

    Args:
        task: Of each of `stages` its `yaml` and `overrides`.
    """
    return {f"stage {stage}": passes(one["yaml"], one["overrides"]) for stage, one in task["stages"].items()}


def passes(yaml: str, overrides: list[str]) -> dict[str, Any]:
    """Two passes over a stage's set."""
    settings = plain(load_config(Path(yaml), overrides))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = assemble_model(**settings["model"], frozen_dtype=torch.bfloat16, empty=True)
    spec: Any = build_loader(settings["train_loader"], model, load_tokenizer(**settings["tokenizer"]))
    rates = []
    for _ in range(2):
        samples, start = 0, time.perf_counter()
        for batch in spec.dataloader:
            samples += len(batch.to(device).sample_ids)
        wait_for_device()
        rates.append(samples / (time.perf_counter() - start))
    return {
        "first_pass_samples_per_s": rates[0],
        "samples_per_s": rates[1],
        "num_workers": settings["train_loader"]["num_workers"],
    }
