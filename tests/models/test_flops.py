from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from composer_path.models.flops import FlopCounter
from composer_path.models.path_mllm import PathMLLM
from composer_path.weights.assembly import assemble_model

LENGTHS = [60, 25, 90]
NUM_IMAGES = 2
NUM_TARGETS = 40
POOLER = {"kind": "reference", "dim": 16, "num_queries": 4, "num_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "the reference's pooler": {"projector": {"pooler": POOLER, "mlp": {"depth": 2}}},
    "open_clip's pooler": {"projector": {"pooler": POOLER | {"kind": "open_clip"}, "mlp": {"depth": 2}}},
    "no pooler": {"projector": {"mlp": {"depth": 2}}},
    "grouped queries": {"llm": {"num_key_value_heads": 1}},
    "wide heads": {"llm": {"head_dim": 24}},
    "tied head": {"llm": {"tie_word_embeddings": True}},
    "without class token": {"vision": {"tokens": "patches"}},
    "windows": {"llm": {"model_type": "mistral", "sliding_window": 16}},
    "experts": {"llm": {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}},
    "narrow experts": {
        "llm": {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
    },
}


def build(trainable: list[str], vision: Any = None, projector: Any = None, llm: Any = None) -> PathMLLM:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 512,
    }
    kwargs = {"embed_dim": 48, "depth": 2, "num_heads": 2}
    model = assemble_model(
        vision_encoder={"name": "timm/vit_tiny_patch16_224", "image_size": 64, "kwargs": kwargs} | (vision or {}),
        projector=projector or {"pooler": POOLER, "mlp": {"depth": 2}},
        language_model={"config": config | (llm or {})},
        trainable=trainable,
        attention="sdpa",
    )
    model.language_model.config._experts_implementation = "eager"  # as products that torch's counter knows
    return model


def step(model: PathMLLM) -> int:
    """Forward and backward pass of a row; returns its operations as torch counts them."""
    borders = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    row, placeholders = int(borders[-1]), NUM_IMAGES * model.num_image_tokens()
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # as products of matrices, which the counter knows on a CPU
        logits = model(
            input_ids=torch.randint(0, 512, (row,)),
            position_ids=torch.cat([torch.arange(length) for length in LENGTHS]),
            cu_seq_lens=borders,
            max_seq_len=max(LENGTHS),
            pixel_values=torch.randint(0, 255, (NUM_IMAGES, 3, 64, 64), dtype=torch.uint8),
            image_index=torch.arange(placeholders),
            logits_index=torch.arange(row - NUM_TARGETS, row),
        )
        logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "trainable",
    [
        ["projector"],
        ["projector", "language_model"],
        ["vision_encoder", "projector", "language_model"],
        ["language_model"],
    ],
    ids="+".join,
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_count_is_within_1_percent_of_what_torch_counts(kind: str, trainable: list[str]) -> None:
    model = build(trainable, **KINDS[kind])
    if kind == "no pooler":  # 17 tokens an image
        assert model.num_image_tokens() * NUM_IMAGES < LENGTHS[0]
    ours = FlopCounter(model).needed(LENGTHS, NUM_IMAGES, NUM_TARGETS, causal_share=1.0).total
    assert ours == pytest.approx(step(model), rel=0.01)


@pytest.mark.parametrize(
    "trainable",
    [
        ["projector", "language_model.layers.1"],
        ["language_model.layers.1.mlp"],
        ["vision_encoder.blocks.1", "projector"],
        ["language_model.lm_head"],
    ],
    ids="+".join,
)
def test_parts_that_learn_are_counted_as_torch_counts_them(trainable: list[str]) -> None:
    """To 6 %: within the lowest block that learns, not every gradient of an input is needed."""
    model = build(trainable)
    ours = FlopCounter(model).needed(LENGTHS, NUM_IMAGES, NUM_TARGETS, causal_share=1.0).total
    assert ours == pytest.approx(step(model), rel=0.06)


def test_causal_attention_counts_half() -> None:
    counter = FlopCounter(build(["projector", "language_model"]))
    whole, half = (counter.needed([1000], 0, 0, causal_share=share).language_model for share in (1.0, 0.5))
    assert whole - half == pytest.approx(0.5 * 3 * 4 * 64 * 2 * 1000**2)


@pytest.mark.parametrize("window", [16, 100])
def test_what_lies_outside_of_a_window_is_not_counted(window: int) -> None:
    """Each token looks at itself and at those before it, `window` in all; half a token each is left out, as always."""
    kinds = ["sliding_attention", "full_attention"]
    llm = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": window, "layer_types": kinds}
    counter = FlopCounter(build(["projector", "language_model"], llm=llm))
    pairs = sum(min(place + 1, window) - 0.5 for length in LENGTHS for place in range(length))
    pairs += sum(0.5 * length**2 for length in LENGTHS)
    matrices = counter.needed([1], 0, 0, causal_share=0.0).language_model * sum(LENGTHS)
    found = counter.needed(LENGTHS, 0, 0).language_model - matrices
    assert found == pytest.approx(3 * 4 * 64 * pairs, rel=0.02)


def test_a_7b_needs_what_its_formula_says() -> None:
    """Body 6.476 B and head 0.131 B weights, 0.536 TFLOP an image (ViT-L/16 at 448 px)."""
    model = assemble_model(
        vision_encoder={"name": "coca_vit-l"},
        projector={"type": "attn_pool+mlp2x_gelu"},
        language_model={
            "config": {
                "model_type": "llama",
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "vocab_size": 32000,
            }
        },
        trainable=["projector", "language_model"],
        empty=True,
    )
    flops = FlopCounter(model).needed([702], 1, 100)
    assert flops.vision_encoder == pytest.approx(0.5359e12, rel=1e-3)
    assert flops.language_model == pytest.approx(6 * 6.476e9 * 702 + 6 * 32 * 4096 * 702**2, rel=1e-3)
    assert flops.head == pytest.approx(6 * 0.131072e9 * 100, rel=1e-6)
    assert flops.projector == pytest.approx(3 * 8.2e9, rel=0.03)


def test_recomputation_costs_one_more_forward_pass_of_the_blocks() -> None:
    counter = FlopCounter(build(["projector", "language_model"]))
    needed = counter.needed(LENGTHS, NUM_IMAGES, NUM_TARGETS)
    again = counter.recomputed(LENGTHS, NUM_IMAGES, NUM_TARGETS, blocks=True, head=True)
    assert again == pytest.approx((needed.language_model + needed.head) / 3)
    assert counter.recomputed(LENGTHS, NUM_IMAGES, NUM_TARGETS, blocks=False, head=False) == 0
