"""Puts a PathMLLM together from the YAML's `model` section."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from composer_path.models.attention import AttentionBackend, kernel_in_words, resolve_attention
from composer_path.models.execution import hold_frozen_units
from composer_path.models.language_model import load_language_model_config
from composer_path.models.lora import add_adapters
from composer_path.models.parameters import cast_parameters, empty_parameters
from composer_path.models.pattern import MODULES, modules_of
from composer_path.models.projector import NUM_MARKS
from composer_path.models.vocabulary_rows import mean_word
from composer_path.weights.language_folder import build_language_model
from composer_path.weights.model_folder import PathMLLM
from composer_path.weights.projector_file import build_projector
from composer_path.weights.vision_file import build_vision_encoder

log = logging.getLogger(__name__)


def assemble_model(
    *,
    vision_encoder: Mapping[str, Any],
    projector: Mapping[str, Any],
    language_model: Mapping[str, Any],
    trainable: Sequence[str],
    lora: Mapping[str, Mapping[str, Any] | None] | None = None,
    attention: AttentionBackend = "auto",
    seed: int = 17,
    frozen_dtype: torch.dtype = torch.float32,
    vocabulary: int | None = None,
    empty: bool | Collection[str] = False,
) -> PathMLLM:
    """Build the three modules, with weights from files or random, and freeze what isn't trained.

    Each module draws its random weights from a seed of its own, so that they don't depend on how another one starts: a
    finetuning run finds the same random encoder that its pretraining run used.

    Args:
        vision_encoder: Keywords of `build_vision_encoder`.
        projector: Keywords of `build_projector`, whose widths are read from its neighbours.
        language_model: Keywords of `build_language_model`.
        trainable: What learns: modules, or parts of them by patterns (`composer_path.models.pattern`).
        lora: Keywords of `add_lora` by module, `language_model` or `vision_encoder`, whose own weights stay frozen.
        attention: See `composer_path.models.attention.resolve_attention`.
        seed: Of random weights.
        frozen_dtype: What is frozen is held in, in whole FSDP units; the others are fp32.
        vocabulary: How many ids the tokenizer has, for `resize_embeddings`; None adds no rows.
        empty: Parameters without storage, for a rank that receives them; or of which modules, where they come from
            elsewhere.
    """
    without = set(MODULES) if empty is True else set(empty or ())
    log.info("attention: %s", kernel_in_words(resolve_attention(attention)))  # refused before weights are read
    chosen = {name: dict(keywords) for name, keywords in (lora or {}).items() if keywords is not None}
    touched = modules_of([*trainable, *(name for name, keywords in chosen.items() if keywords.get("use_dora"))])
    dtypes = {name: torch.float32 if name in touched else frozen_dtype for name in MODULES}
    if "vision_encoder" in without:  # only the rank that holds weights reads their files
        vision_encoder = {**vision_encoder, "weights": None}
    if "projector" in without:
        projector = {**projector, "weights": None, "pooler_weights": None}
    hidden_size = load_language_model_config(language_model.get("path") or language_model.get("config")).hidden_size
    with torch.random.fork_rng(devices=[]):
        with empty_parameters(enabled="vision_encoder" in without):
            torch.manual_seed(seed)
            vision = build_vision_encoder(**vision_encoder)
        with empty_parameters(enabled="projector" in without):
            torch.manual_seed(seed + 1)
            adapter = build_projector(**projector, vision_encoder=vision, in_dim=vision.dim, out_dim=hidden_size)
        torch.manual_seed(seed + 2)
        held: dict[str, Any] = {"dtype": dtypes["language_model"], "vocabulary": vocabulary}
        held["empty"] = "language_model" in without
        llm = build_language_model(**language_model, attention=attention, **held)
    if adapter.marks is not None and projector.get("weights") is None and not without & {"projector", "language_model"}:
        adapter.marks.data = mean_word(llm, NUM_MARKS)
    cast_parameters(vision, dtypes["vision_encoder"])
    cast_parameters(adapter, dtypes["projector"])
    model = PathMLLM(vision, adapter, llm)
    model.trainable(trainable)
    with empty_parameters(enabled=empty is True):
        add_adapters(model, chosen, seed + 3)
    hold_frozen_units(model, frozen_dtype)
    return model
