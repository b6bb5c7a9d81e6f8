"""Every language model that is taken equals itself alone on a padding-free row: logits and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_language_models import CASES, tiny
from transformers import AutoConfig, AutoModelForCausalLM

from composer_path.models.attention import pack_attention
from composer_path.models.language_model import load_language_model_config, untrained_language_model
from composer_path.models.language_types import (
    check_attention_supported,
    check_length_supported,
    decoder_blocks,
    decoder_of,
)
from composer_path.models.rope_keys import TRANSFORMERS_MAJOR

LENGTHS = (20, 3, 13, 1)  # two are longer than the window


def whole(model: Any, ids: torch.Tensor, pull: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of the row and gradients, in one pass over it."""
    borders = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    keywords: dict[str, Any] = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), borders)
    keywords |= dict.fromkeys(("max_length_q", "max_length_k"), max(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    embeds = model.get_input_embeddings()(ids)[None]
    logits = model(inputs_embeds=embeds, position_ids=positions, use_cache=False, **keywords).logits[0]
    (logits * pull).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def alone(model: Any, ids: torch.Tensor, pull: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same, one sample at a time, by transformers' own eager attention."""
    parts = []
    for sample, factor in zip(ids.split(LENGTHS), pull.split(LENGTHS), strict=True):
        parts.append(model(input_ids=sample[None], use_cache=False).logits[0])
        (parts[-1] * factor).sum().backward()
    return torch.cat(parts).detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_packed_row_equals_each_sample_alone(name: str, kind: str) -> None:
    keys = tiny(name, kind)
    torch.manual_seed(0)
    try:
        ours = untrained_language_model(keys, attention="sdpa")
    except ValueError as error:
        if TRANSFORMERS_MAJOR < 5 and ("needs transformers 5" in str(error) or "does not go through" in str(error)):
            pytest.skip("before transformers 5 it has an attention of its own, and is refused by name")
        raise
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    theirs = AutoModelForCausalLM.from_config(copy.deepcopy(ours.config), attn_implementation="eager")
    theirs.load_state_dict(ours.state_dict())
    pack_attention(ours)
    ids, pull = torch.randint(3, 96, (sum(LENGTHS),)), torch.randn(sum(LENGTHS), 96)
    (logits, gradients), (expected, right) = whole(ours.train(), ids, pull), alone(theirs.train(), ids, pull)
    assert ((logits - expected).norm() / expected.norm()).item() < 1e-5  # measured 7e-7 at most
    assert gradients.keys() == right.keys()
    errors = {n: ((gradients[n] - right[n]).norm() / (right[n].norm() + 1e-6)).item() for n in right}
    assert max(errors.values()) < 1e-5  # measured 7e-6 at most
    assert len(decoder_blocks(ours)) == 2 and hasattr(decoder_of(ours), "forward")
    padded = ours.eval()(input_ids=ids[None, : LENGTHS[0]], use_cache=False).logits[0]  # as generation does it
    torch.testing.assert_close(padded, expected[: LENGTHS[0]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "keys", "named"),
    [
        ("minimax", {}, "layers of other kinds"),
        ("llama4_text", {}, "attention_chunk_size=8192"),
        ("falcon", {"alibi": True}, "alibi=True"),
        ("gpt2", {"add_cross_attention": True}, "cross-attention"),
        ("gemma", {"use_bidirectional_attention": True}, "attention to tokens ahead"),
        ("qwen2_moe", {}, "was never compared with itself alone"),
        ("mistral", {"sliding_window": 0}, "sliding_window must be above 0, found 0"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping must be above 0"),
    ],
)
def test_models_that_attend_in_another_way_are_refused_by_name(
    model_type: str, keys: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=f"language model '{model_type}'.*{named}"):
        check_attention_supported(AutoConfig.for_model(model_type, **keys))


def test_learned_positions_end() -> None:
    config = AutoConfig.for_model("gpt2", n_positions=64)
    check_length_supported(config, 64)
    with pytest.raises(ValueError, match="has learned 64 positions, found samples of 65 tokens; set max_seq_len"):
        check_length_supported(config, 65)


@pytest.mark.skipif(TRANSFORMERS_MAJOR >= 5, reason="these words are transformers 5's own")
def test_gemma_3_of_transformers_5_keeps_both_ropes() -> None:
    ropes = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 9e5}}
    ropes |= {"sliding_attention": {"rope_type": "default", "rope_theta": 777.0}}
    config = load_language_model_config(tiny("gemma3_text", "windows") | {"rope_parameters": ropes})
    assert (config.rope_theta, config.rope_local_base_freq) == (9e5, 777.0)
    assert config.rope_scaling == {"rope_type": "linear", "factor": 8.0}
