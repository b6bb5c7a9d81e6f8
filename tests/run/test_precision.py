"""Claims about precision: what frozen weights are held in, and what bf16 becomes on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from composer_path.run.precision import compute_dtype, settle_precision


@pytest.mark.parametrize(
    ("precision", "mixed", "dtype"),
    [
        ("amp_bf16", None, torch.bfloat16),
        ("amp_bf16", "DEFAULT", torch.bfloat16),
        ("amp_bf16", "PURE", torch.bfloat16),
        ("amp_bf16", "FULL", torch.float32),
        ("fp32", "DEFAULT", torch.float32),
        ("fp32", {"param_dtype": "bf16", "reduce_dtype": "fp32"}, torch.bfloat16),
        ("amp_bf16", {"param_dtype": "fp32"}, torch.float32),
        ("amp_bf16", {"reduce_dtype": "fp32"}, torch.bfloat16),
    ],
)
def test_frozen_weights_are_held_in_the_dtype_of_products(precision: str, mixed: Any, dtype: torch.dtype) -> None:
    section = None if mixed is None else {"fsdp": {"mixed_precision": mixed}}
    assert compute_dtype(precision, section) == dtype


@pytest.mark.parametrize(
    ("device", "trainer", "precision", "mixed"),
    [
        ("cuda", {"precision": "amp_bf16", "parallelism_config": {"fsdp": None}}, "amp_bf16", None),
        ("cpu", {"precision": "fp32", "parallelism_config": {"fsdp": None}}, "fp32", None),
        ("cpu", {"precision": "amp_bf16", "parallelism_config": {"fsdp": None}}, "fp32", None),
        ("cpu", {"precision": "amp_bf16", "parallelism_config": None}, "fp32", None),
        (
            "cpu",
            {"precision": "amp_bf16", "parallelism_config": {"fsdp": {"mixed_precision": "DEFAULT"}}},
            "fp32",
            {"param_dtype": "bf16", "reduce_dtype": "fp32"},
        ),
        (
            "cpu",
            {"precision": "amp_bf16", "parallelism_config": {"fsdp": {"mixed_precision": "PURE"}}},
            "fp32",
            {"param_dtype": "bf16", "reduce_dtype": "bf16"},
        ),
        ("cpu", {"precision": "amp_bf16", "parallelism_config": {"fsdp": {"mixed_precision": "FULL"}}}, "fp32", "FULL"),
    ],
)
def test_bf16_on_a_cpu_becomes_fsdps_mixed_precision_or_fp32(
    device: str, trainer: dict[str, Any], precision: str, mixed: Any
) -> None:
    settle_precision(trainer, device)
    assert trainer["precision"] == precision
    assert ((trainer["parallelism_config"] or {}).get("fsdp") or {}).get("mixed_precision") == mixed
