"""LoRA under FSDP2: two ranks learn what one learns, in bf16 too, and leave the same merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launched_ranks import launch
from safetensors.torch import load_file
from tiny_run import convert_shards, load_tiny_config, run, weights_of

pytest.importorskip("peft", reason="peft isn't installed (composer_path[lora])")
pytestmark = [pytest.mark.slow]
DORA = "{r: 4, lora_alpha: 16, use_dora: true}"
LORA = "{r: 4, lora_alpha: 16}"
WORDS = [
    "model.projector.weights=null",
    "model.trainable=[projector]",
    f"model.lora={{language_model: {LORA}, vision_encoder: {LORA}}}",
    "algorithms=null",
    "trainer.max_duration=3ba",
    "eval_loader=null",
]


def test_two_ranks_learn_the_adapters_that_one_learns_and_leave_the_same_model(tmp_path: Path) -> None:
    shards = convert_shards(tmp_path / "shards")
    legs: list[dict[str, Any]] = [
        {"name": "fp32", "stage": "finetune", "overrides": [*WORDS, "trainer.precision=fp32"]},
        {"name": "bf16", "stage": "finetune", "overrides": [*WORDS, "trainer.precision=amp_bf16"]},
        {"name": "dora", "stage": "finetune", "overrides": [*WORDS, f"model.lora.vision_encoder={DORA}"]},
    ]
    (tmp_path / "two").mkdir()
    launched = launch(2, "two_ranks.py", legs, shards, tmp_path / "two")
    assert launched.returncode == 0, launched.output[-4000:]
    one = load_tiny_config("finetune", shards, tmp_path / "one", legs[0]["overrides"])
    trainer, seen = run(one)
    first, second = launched.notes["fp32"]
    assert list(first["losses"].values()) == pytest.approx(list(seen.losses.values()), rel=1e-5)
    alone = weights_of(trainer)
    learned = [name for name in alone if ".lora_" in name]
    assert learned and all(torch.equal(first["weights"][name], second["weights"][name]) for name in learned)
    assert max(float((first["weights"][name] - alone[name]).abs().max()) for name in learned) < 1e-4
    roots = (tmp_path / "one", tmp_path / "two" / "fp32")
    merged = [load_file(root / "finetune" / "model" / "model.safetensors") for root in roots]
    assert merged[0].keys() == merged[1].keys() and not any("lora" in name for name in merged[0])
    assert max(float((merged[0][name] - merged[1][name]).abs().max()) for name in merged[0]) < 1e-4
    for name in ("bf16", "dora"):
        half = launched.notes[name][0]
        assert list(half["losses"].values()) == pytest.approx(list(seen.losses.values()), rel=2e-2)
        assert {w.dtype for key, w in half["weights"].items() if ".lora_" in key} == {torch.float32}
