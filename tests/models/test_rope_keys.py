"""A configuration means the same RoPE whichever version of transformers wrote it, and whichever reads it."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from composer_path.models.language_model import load_language_model_config
from composer_path.models.path_mllm import PathMLLM
from composer_path.models.rope_keys import TRANSFORMERS_MAJOR, check_rope_supported, old_rope_keys
from composer_path.weights.assembly import assemble_model
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


# --- kinds that depend on a row's longest sample ---------------------------------------------------------------------

KNOWN = 64  # positions that the model was first trained with
NO_FACTOR = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
LONG = NO_FACTOR | {"factor": 4.0}
BY_LENGTH = {
    "dynamic": {"max_position_embeddings": KNOWN, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "dynamic, old word": {"max_position_embeddings": KNOWN, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "longrope": {"original_max_position_embeddings": KNOWN, "rope_scaling": LONG},
}
FIXED = {
    "default": {"max_position_embeddings": KNOWN},
    "linear": {"max_position_embeddings": KNOWN, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {"rope_scaling": LLAMA3_SCALING},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": KNOWN}},
}


def model_with_rope(words: dict[str, Any]) -> PathMLLM:
    config = {**LLAMA, "initializer_range": 0.3, **words}
    return assemble_model(
        vision_encoder={
            "name": "timm/vit_tiny_patch16_224",
            "image_size": 32,
            "kwargs": {"embed_dim": 24, "depth": 1, "num_heads": 2},
        },
        projector={"type": "linear"},
        language_model={"config": config},
        trainable=["projector"],
    )


def logits_of_row(model: PathMLLM, lengths: list[int]) -> list[torch.Tensor]:
    """Logits of samples of text in one row; each sample's ids depend on its length alone."""
    ids = [torch.arange(length) * 7 % 96 for length in lengths]
    with torch.no_grad():
        logits = model(
            input_ids=torch.cat(ids),
            position_ids=torch.cat([torch.arange(length) for length in lengths]),
            cu_seq_lens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            max_seq_len=max(lengths),
            pixel_values=torch.zeros((0, 3, 32, 32), dtype=torch.uint8),
            image_index=torch.zeros(0, dtype=torch.int64),
        )
    return list(logits.split(lengths))


@pytest.mark.parametrize("kind", [*BY_LENGTH, *FIXED])
def test_a_sample_beside_a_longer_one_is_as_alone_or_the_row_is_refused_by_name(kind: str) -> None:
    model = model_with_rope((BY_LENGTH | FIXED)[kind])
    (alone,) = logits_of_row(model, [20])
    beside, _ = logits_of_row(model, [20, KNOWN])
    assert torch.allclose(alone, beside, atol=1e-5)
    if kind in BY_LENGTH:
        with pytest.raises(
            ValueError, match=rf"its RoPE \({kind.partition(',')[0]}\) depends .* beyond 64 tokens, found 100"
        ):
            logits_of_row(model, [20, 100])
    else:
        beside, _ = logits_of_row(model, [20, 100])
        assert torch.allclose(alone, beside, atol=1e-5)


SAME = LONG | {"long_factor": LONG["short_factor"], "factor": 1.0}
PHI_3 = {"model_type": "phi3", "pad_token_id": 0, "original_max_position_embeddings": KNOWN}
OF_PHI_3 = {"type": "longrope", "short_factor": [1.5] * 4, "long_factor": [4.0] * 4}
# Of each: a language model, and the lengths of a row whose longest sample is as long as it may be.
ALONE: dict[str, tuple[dict[str, Any], list[int]]] = {
    **{kind: (words, [20, KNOWN, 3]) for kind, words in BY_LENGTH.items()},
    "Phi-3": (
        PHI_3 | {"rope_scaling": {"type": "longrope", "short_factor": [1.5] * 4, "long_factor": [4.0] * 4}},
        [64, 9],
    ),
    "one set of factors": ({"original_max_position_embeddings": KNOWN, "rope_scaling": SAME}, [20, 100, KNOWN]),
}


@pytest.mark.parametrize("kind", ALONE)
def test_each_sample_of_a_row_is_as_in_transformers_alone(kind: str) -> None:
    """Also after a longer sample was tried, whose frequencies transformers would keep."""
    words, lengths = ALONE[kind]
    ours = model_with_rope(words)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_config(deepcopy(ours.language_model.config), attn_implementation="eager")
        theirs.load_state_dict(ours.language_model.state_dict())
        if kind != "one set of factors":
            with pytest.raises(ValueError, match="depends on a row's longest sample beyond 64 tokens, found 65"):
                logits_of_row(ours, [3, KNOWN + 1])
        for found, length in zip(logits_of_row(ours, lengths), lengths, strict=True):
            expected = deepcopy(theirs)(input_ids=(torch.arange(length) * 7 % 96)[None]).logits[0]
            assert ((found - expected).norm() / expected.norm()).item() < 1e-5  # measured 6e-7 at most
        longer = theirs(input_ids=(torch.arange(100) * 7 % 96)[None]).logits[0, :20]
    assert torch.allclose(longer, logits_of_row(ours, [20])[0], atol=1e-3) is (kind == "one set of factors")


def test_a_row_that_is_filled_up_beyond_the_known_positions_is_refused_too() -> None:
    model = model_with_rope(BY_LENGTH["dynamic"])
    model.row_multiple = 128
    with pytest.raises(ValueError, match=r"found 128: .*execution\.row_multiple"):
        logits_of_row(model, [20])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "must be one of default, linear.*found 'spiral'"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "must be one of default, linear.*found 'spiral'"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "must be one of .*found 'spiral'"),
        (
            {"rope_scaling": {"rope_type": "linear"}},
            r"\(linear\) needs factor to be .*found nothing|required keys .*factor",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "needs factor to be a number from 1 .*found '2'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "needs factor to be a number from 1 .*found 0.0"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            r"\(llama3\) needs low_freq_factor|required keys .*low_freq_factor",
        ),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": 1.0}},
            "needs short_factor to be a list|required keys .*long_factor",
        ),
        *[({"rope_scaling": NO_FACTOR}, r"\(longrope\) needs factor")] * (TRANSFORMERS_MAJOR < 5),
        ({"rope_theta": -1.0}, "needs rope_theta to be a number"),
        ({"rope_theta": True}, "needs rope_theta to be a number"),
    ],
)
def test_a_rope_of_which_no_frequencies_can_be_made_is_named(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_language_model(config={**LLAMA, **words})
    assert "\n" not in str(caught.value) and "KeyError" not in str(caught.value)


@pytest.mark.skipif(TRANSFORMERS_MAJOR < 5, reason="transformers 4 has one RoPE for all layers")
def test_layers_with_a_rope_of_their_own_are_looked_at_one_by_one() -> None:
    config = AutoConfig.for_model("llama", max_position_embeddings=KNOWN)
    config.rope_parameters = {"full": {"rope_type": "default"}, "other": {"rope_type": "dynamic", "factor": 2.0}}
    check_rope_supported(config, KNOWN)
    with pytest.raises(ValueError, match=r"RoPE \(dynamic\)"):
        check_rope_supported(config, KNOWN + 1)
