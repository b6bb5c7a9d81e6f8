"""What is compared in each stage, and the product's YAML as each of them runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
YAMLS = {"1": "pretrain", "2": "finetune"}
LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
LLAMA_TINY = LLAMA_7B | {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
TINY = [
    "model.vision_encoder={image_size: 64, kwargs: {embed_dim: 64, depth: 2, num_heads: 1}}",
    "model.projector.type=null",
    "model.projector.pooler={kind: reference, dim: 32, num_queries: 8, num_heads: 2}",
    "train_loader.timeout=0",
]
BATCH = {"1": 64, "2": 32}
BATCH_TINY = 4
LONGEST = 2048  # tokens; no sample of the sets is longer
LARGEST_ROW = 16384  # tokens; beyond it a row gains nothing


@dataclass(frozen=True)
class Variant:
    """One way to train the same samples.

    Attributes:
        work: The module that runs it.
        checkpointing: What its backward pass recomputes.
        execution: Further words of the YAML's section.
        needs_cuda: Whether a CPU can't run it.
        chosen: Whether it runs unless others are named.
    """

    work: str
    checkpointing: str
    execution: tuple[str, ...] = ()
    needs_cuda: bool = False
    chosen: bool = True


# In the order in which they run; what compiles comes last.
BASELINE = "eager"
VARIANTS = {
    BASELINE: Variant("road", "off"),
    "liger": Variant("road", "off", ("execution.fusion=liger",), needs_cuda=True),
    "padded": Variant("padded", "full"),  # the reference's way
    "transformers": Variant("peer", "off"),  # padding-free, with Liger's kernels where there is a GPU
    "selective": Variant("road", "selective", chosen=False),
    "compile": Variant("road", "off", ("execution.fusion=compile", "execution.row_multiple=256"), needs_cuda=True),
}
OURS = ("eager", "liger", "selective", "compile")


def row_tokens(variant: Variant, prepared: Mapping[str, Any], stage: str) -> int:
    """Tokens of the largest row that `plan` allows on this card.

    A padded batch computes logits at every position, in bf16 and fp32 with gradients: 12 bytes a token and entry of the
    vocabulary; and 2.5 times as many positions as there are tokens.
    """
    fit, free = prepared["stages"][stage]["fits"][variant.checkpointing], prepared["stages"][stage]["free"]
    most = fit["most_tokens"]
    if variant.work == "padded":
        most = int(max(0.0, free - fit["fixed"]) / (fit["per_token"] + 12 * prepared["vocabulary"]) / 2.5)
    return min(LARGEST_ROW, most // 256 * 256)


def peer_recomputes(prepared: Mapping[str, Any], stage: str, batch: int) -> bool:
    """Whether transformers' Trainer, which gets a batch as one row, must recompute activations to fit.

    It holds 8 bytes a trained weight: weight, gradient and two moments in bf16.
    """
    facts = prepared["stages"][stage]
    fit = facts["fits"]["off"]
    row = fit["fixed"] + fit["per_token"] * 1.2 * batch * facts["tokens"]
    return row + 8.0 * facts["trained"] + 2.0 * facts["frozen"] > prepared["memory"] * (1 - prepared["reserved"])


def overrides(stage: str, tiny: bool, places: Mapping[str, str], steps: int) -> list[str]:
    """The product's YAML of a stage for a made-up set; nothing is saved, no rows are chosen yet.

    Args:
        stage: `1` or `2`.
        tiny: Sizes that a CPU runs.
        places: `save_root`, and folders of `shards`, `language_model` and `tokenizer`.
        steps: Of the run.
    """
    return [
        f"save_root={places['save_root']}",
        f"tokenizer.path={places['tokenizer']}",
        "model.vision_encoder.weights=null",
        "model.projector={weights: null, pooler_weights: null}",
        f"model.language_model.path={places['language_model']}",
        f"train_loader.dataset={{local: {places['shards']}, shuffle: false, num_canonical_nodes: 1}}",
        f"train_loader.dataset.max_seq_len={LONGEST}",
        f"train_loader.global_batch_size={BATCH_TINY if tiny else BATCH[stage]}",
        f"train_loader.num_workers={0 if tiny else 8}",
        "eval_loader=null",
        "scheduler=null",
        "scheduler={name: constant}",
        "callbacks=null",
        "callbacks={speed_report: {window_size: 2}, memory_monitor: {}, batch_report: {}}",
        "loggers=null",
        f"trainer={{max_duration: {steps}ba, eval_interval: 1ep, save_interval: null, autoresume: false}}",
        *(TINY if tiny else ()),
    ]
