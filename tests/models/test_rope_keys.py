"""A configuration means the same RoPE whichever version of transformers wrote it, and whichever reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from composer_path.models.language_model import load_language_model_config
from composer_path.models.rope_keys import TRANSFORMERS_MAJOR, old_rope_keys
from composer_path.weights.language_folder import build_language_model

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 256,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# What transformers 5 writes, and what transformers 4 wrote for the same model.
BOTH_WORDS = {
    "theta": ({"rope_type": "default", "rope_theta": 777.0}, {"rope_theta": 777.0, "rope_scaling": None}),
    "llama3": (
        {**LLAMA3_SCALING, "rope_theta": 5000.0},
        {"rope_theta": 5000.0, "rope_scaling": LLAMA3_SCALING},
    ),
    "linear": (
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
}


def frequencies(model: torch.nn.Module) -> torch.Tensor:
    """The model's angles a position, which RoPE's settings decide."""
    return next(buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq"))


@pytest.mark.parametrize("kind", BOTH_WORDS)
@pytest.mark.parametrize("source", ["keys", "config_file", "folder"])
def test_both_ways_to_write_rope_give_the_same_frequencies(tmp_path: Path, kind: str, source: str) -> None:
    new, old = BOTH_WORDS[kind]
    built: list[torch.Tensor] = []
    for name, words in {"new": {"rope_parameters": new}, "old": old}.items():
        config: dict[str, Any] = {**LLAMA, **words}
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        if source == "keys":
            model = build_language_model(config=config)
        elif source == "config_file":
            model = build_language_model(config=str(folder / "config.json"))
        else:
            build_language_model(config=config).save_pretrained(folder)
            (folder / "config.json").write_text(json.dumps(config))  # in these words, not in this version's
            model = build_language_model(path=str(folder))
        built.append(frequencies(model))
    assert torch.equal(*built)
    assert not torch.equal(built[0], frequencies(build_language_model(config=LLAMA)))


@pytest.mark.parametrize("kind", BOTH_WORDS)
def test_new_words_become_the_old_ones(kind: str) -> None:
    new, old = BOTH_WORDS[kind]
    assert old_rope_keys(new) == old


def test_a_partial_rotation_keeps_its_share() -> None:
    keys = old_rope_keys({"rope_type": "default", "rope_theta": 10.0, "partial_rotary_factor": 0.25})
    assert keys == {"rope_theta": 10.0, "partial_rotary_factor": 0.25, "rope_scaling": None}


def test_settings_of_single_layers_are_refused_where_they_would_be_lost() -> None:
    nested = {"full_attention": {"rope_theta": 5.0, "rope_type": "default"}}
    with pytest.raises(ValueError, match="rope_parameters differ between layers"):
        old_rope_keys(nested)
    if TRANSFORMERS_MAJOR < 5:
        with pytest.raises(ValueError, match="install transformers 5"):
            load_language_model_config({**LLAMA, "rope_parameters": nested})
