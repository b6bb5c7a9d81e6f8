"""Which language models may be trained on padding-free rows: those that were compared with themselves alone."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from composer_path.models.rope_keys import TRANSFORMERS_MAJOR, check_rope_supported

log = logging.getLogger(__name__)

# Each is compared with transformers' own, one sample at a time, logits and gradients: tests/models/test_language_types.
# fmt: off
TESTED = frozenset((
    "apertus", "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
    "gpt2", "gpt_neox", "gpt_oss", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "internlm3", "llama",
    "ministral", "ministral3", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2",
    "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
))
# fmt: on
LAYERS = {"full_attention", "sliding_attention"}
# What else a configuration can ask for that a padding-free row doesn't give.
REFUSED = {
    "attention_chunk_size": "chunked attention",
    "attention_sink": "attention sinks",
    "alibi": "ALiBi position biases",
    "use_bidirectional_attention": "attention to tokens ahead",
    "add_cross_attention": "cross-attention",
    "is_encoder_decoder": "an encoder",
}
SINCE_5 = {"gpt2"}  # before, it keeps the row's borders from its own layers
LEARNED_POSITIONS = {"gpt2"}  # a table of them, that ends
SCORED = {"gemma2", "gpt_oss"}  # soft-capped scores or sinks, which transformers' `sdpa` leaves out without a word


def check_attention_supported(config: PretrainedConfig) -> None:
    """Refuse, by name, a language model that wasn't compared with itself alone, or asks for other attention.

    Full and sliding causal attention are computed, in any mixture of layers, with soft-capped scores and sinks.
    """
    for key, words in REFUSED.items():
        if value := getattr(config, key, None):
            raise ValueError(
                f"language model '{config.model_type}' uses {words} ({key}={value}), which padding-free attention does "
                "not compute; choose a model with causal attention"
            )
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and (others := sorted(set(map(str, kinds)) - LAYERS)):
        raise ValueError(
            f"language model '{config.model_type}' uses layers of other kinds (layer_types={others}), which "
            "padding-free attention does not compute; choose a model with causal attention"
        )
    if config.model_type not in TESTED:
        raise ValueError(
            f"language model '{config.model_type}' was never compared with itself alone on a padding-free row, whose "
            f"samples might see each other; choose one of {', '.join(sorted(TESTED))}"
        )
    if config.model_type in SINCE_5 and TRANSFORMERS_MAJOR < 5:
        raise ValueError(f"language model '{config.model_type}' needs transformers 5 on a padding-free row; install it")
    softcap, window = getattr(config, "attn_logit_softcapping", None), getattr(config, "sliding_window", None)
    for key, value, kind in (("attn_logit_softcapping", softcap, (int, float)), ("sliding_window", window, int)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind) or value <= 0):
            raise ValueError(
                f"language model '{config.model_type}': {key} must be above 0, found {value!r}; correct it"
            )


def check_length_supported(config: PretrainedConfig, longest: int) -> None:
    """Refuse samples that are longer than a language model can place.

    Raises:
        ValueError: A table of learned positions ends before, or see `check_rope_supported`.
    """
    known = getattr(config, "max_position_embeddings", None)
    if known is not None and longest > known and config.model_type in LEARNED_POSITIONS:
        raise ValueError(
            f"language model '{config.model_type}' has learned {known} positions, found samples of {longest} "
            f"tokens; set max_seq_len (and execution.row_multiple) to at most {known}"
        )
    check_rope_supported(config, longest)


def warn_of_length(config: PretrainedConfig, longest: int) -> None:
    """Say it where samples may be longer than those that the model was made for."""
    known = getattr(config, "max_position_embeddings", None)
    if known is not None and longest > known:
        log.warning("max_seq_len=%d is more than the %d positions the language model knows", longest, known)


def longest_conversation(config: PretrainedConfig, max_seq_len: int | None) -> int | None:
    """How many tokens a conversation may have: as in training, else as many as the language model can place."""
    known: int | None = getattr(config, "max_position_embeddings", None)
    return known if max_seq_len is None else max_seq_len


def room_behind(num_tokens: int, limit: int | None) -> int:
    """How many tokens may be written behind a conversation's.

    Args:
        num_tokens: Of the conversation so far.
        limit: See `longest_conversation`.

    Raises:
        ValueError: Not even one.
    """
    if limit is not None and num_tokens >= limit:
        raise ValueError(f"the conversation takes {num_tokens} tokens of {limit}; start a new one")
    return 2**31 if limit is None else limit - num_tokens


def go_on(language_model: Any, embeds: Tensor, **generation: Any) -> Tensor:
    """New ids behind an embedded prompt of shape (tokens, width), greedily by default, as transformers writes them."""
    mask = torch.ones((1, len(embeds)), dtype=torch.int64, device=embeds.device)
    keywords = {"do_sample": False, "use_cache": True} | generation
    with torch.no_grad():
        return language_model.generate(inputs_embeds=embeds[None], attention_mask=mask, **keywords)[0]


def padded_attention(config: PretrainedConfig) -> str:
    """The attention of transformers' own that computes this model whole."""
    return "eager" if config.model_type in SCORED else "sdpa"


def inputs_scale(config: PretrainedConfig) -> float:
    """What the decoder multiplies its inputs by where it should its word embeddings only; image vectors are none.

    Gemma 1 and 2 do so before transformers 5, which then has the embedding do it, as Gemma 3 always had.
    """
    scales = TRANSFORMERS_MAJOR < 5 and config.model_type in ("gemma", "gemma2")
    return config.hidden_size**0.5 if scales else 1.0


def decoder_of(language_model: PreTrainedModel) -> Any:
    """A causal language model without its head."""
    decoder = language_model.base_model
    return language_model.model if decoder is language_model else decoder  # before transformers 5, Gemma 3


def decoder_blocks(language_model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks of a Hugging Face causal language model: what FSDP and checkpointing wrap one by one."""
    decoder = decoder_of(language_model)
    blocks = getattr(decoder, "layers", None) or getattr(decoder, "h", None)
    if not isinstance(blocks, nn.ModuleList):
        name = type(language_model).__name__
        raise ValueError(f"language model {name}: its blocks are found neither at 'layers' nor at 'h'; take another")
    return blocks
