"""Gradients of every cell of fusion, checkpointing, stage and precision, against those of a plain step.

A small model with a 7B's proportions; in fp32, where an error can't hide in rounding, and as in training, in bf16 under
autocast, where the flash kernel computes attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.work import Report
from benchmarks.proportions import build_proportioned_model, draw_batch
from composer_path import ComposerPathMLLM
from composer_path.batches.batch import Batch, PackedCollator
from composer_path.models.execution import choose_execution

STAGES = {"1": ("projector",), "2": ("projector", "language_model")}
CHECKPOINTING = ("off", "selective", "full")
# Relative, of the gradient of any one weight: sums in another order; and rounding to bf16 after other operations (a
# plain step in bf16 is 0.13 off one in fp32 in the projector's LayerNorm, on a CPU).
TOLERANCE = {"fp32": 1e-4, "bf16": 0.25}
IMAGE_SIZE = 112


def run(task: dict[str, Any], report: Report) -> dict[str, Any]:
    """Largest errors of each cell; what is there already is reported after each.

    Args:
        task: `fusion`.
        report: Told what is known so far.

    Raises:
        ValueError: Cells differ (named).
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = PackedCollator()(draw_batch("mixture", 4, seed=3, image_size=IMAGE_SIZE, shorter=4)).to(device)
    found: dict[str, Any] = {}
    for precision, stage in product(TOLERANCE if device.type == "cuda" else ["fp32"], STAGES):
        expected = step(stage, batch, precision, "off", "off")
        for checkpointing in CHECKPOINTING:
            torch._dynamo.reset()
            cell = compare(step(stage, batch, precision, task["fusion"], checkpointing), expected)
            found[f"{precision}, stage {stage}, {checkpointing}"] = cell
            report(found)
    wrong = [name for name in found if not worst(found[name]) <= TOLERANCE[name.partition(",")[0]]]
    if wrong:
        raise ValueError(f"cells: loss or gradients differ in {'; '.join(wrong)}")
    return found


def step(stage: str, batch: Batch, precision: str, fusion: Any, checkpointing: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a model that is built anew."""
    model = build_proportioned_model(STAGES[stage], image_size=IMAGE_SIZE, llama={"num_hidden_layers": 2}).to(
        batch.input_ids.device
    )
    adapter = ComposerPathMLLM(choose_execution(model, fusion=fusion, activation_checkpointing=checkpointing))
    kind = batch.input_ids.device.type
    with torch.autocast(kind, torch.bfloat16) if precision == "bf16" else nullcontext():
        loss = adapter.loss(adapter(batch), batch)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> dict[str, Any]:
    """Relative error of the loss, and the largest of a weight's gradient."""
    largest, name = max(errors(found[1], expected[1]))
    return {"loss_error": abs(found[0] / expected[0] - 1), "gradient_error": largest, "of": name}


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Iterator[tuple[float, str]]:
    """Of each weight; one whose gradient is 0 but for rounding is compared with the mean of all."""
    if found.keys() != expected.keys():
        raise ValueError(f"cells: {len(found)} weights have gradients, expected {len(expected)}")
    norms = {name: gradient.norm().item() for name, gradient in expected.items()}
    least = 1e-3 * sum(norms.values()) / len(norms)
    for name, gradient in expected.items():
        yield (found[name] - gradient).norm().item() / max(norms[name], least), name


def worst(cell: dict[str, Any]) -> float:
    """Of loss and gradients; NaN where either is."""
    return max(cell["loss_error"], cell["gradient_error"], key=lambda error: (error != error, error))
