"""A run from a stock LLaVA: trained, resumed, exported, handed on in the same shape, and started from again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from stock_llavas import VISION, stock_llava
from tiny_run import REPO_ROOT, Interrupted, Witness, convert_shards, run, tiny_overrides, weights_of
from transformers import LlavaForConditionalGeneration

from composer_path.cli import main
from composer_path.config.reading import load_config
from composer_path.handing_on.comparison import compare
from composer_path.weights.assembly import assemble_model
from composer_path.weights.whole_folder import sections_of


def config_of(root: Path, start: Path, more: list[str]) -> Any:
    """The demo's stage 2, tiny, whose model is a folder's."""
    content: Any = OmegaConf.to_container(OmegaConf.load(REPO_ROOT / "yamls" / "demo" / "finetune.yaml"))
    content["model"] = {"path": str(start), "trainable": ["projector", "language_model"], "attention": "sdpa"}
    (root / "run.yaml").write_text(json.dumps(content))
    tiny = [one for one in tiny_overrides("finetune", convert_shards(root / "shards"), root) if "model." not in one]
    return load_config(root / "run.yaml", [*tiny, "trainer.max_duration=2ba", "trainer.save_interval=1ba", *more])


@pytest.mark.slow
def test_it_is_trained_resumed_exported_and_started_from_again(tmp_path: Path) -> None:
    stock_llava(tmp_path / "stock", VISION, {"vocab_size": 32000, "max_position_embeddings": 512})
    with pytest.raises(Interrupted):
        run(config_of(tmp_path, tmp_path / "stock", []), Witness(stop_after=1))
    trainer, witness = run(config_of(tmp_path, tmp_path / "stock", ["trainer.autoresume=true"]))
    assert list(witness.losses) == [1]
    weights = weights_of(trainer)
    assert main(["export", str(tmp_path / "finetune"), str(tmp_path / "out"), "--as", "llava-hf"]) == 0
    sections: dict[str, Any] = sections_of(tmp_path / "out")
    again = assemble_model(**sections, trainable=["projector"], attention="sdpa").state_dict()
    for name, value in weights.items():
        assert torch.equal(again[name][: len(value)], value), name
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert stock.config.vision_config.num_hidden_layers == 2  # the last block's output was never used
    changed = compare(tmp_path / "stock", tmp_path / "out")
    moved = {name.partition("vision_tower")[1] for name, one in changed.tensors.items() if one.differing}
    assert moved == {""}  # the frozen tower is as it came
