"""Patterns pick weights by name, and one that picks nothing is told what is near."""

from __future__ import annotations

import time

import pytest
import torch

from composer_path import PathMLLM
from composer_path.models.pattern import check_pattern, pick
from composer_path.weights.assembly import assemble_model

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 12, "num_attention_heads": 4}
VISION = {"image_size": 32, "kwargs": {"embed_dim": 24, "depth": 3, "num_heads": 2}}


def build(trainable: list[str], dtype: torch.dtype = torch.float32, tied: bool = False) -> PathMLLM:
    return assemble_model(
        vision_encoder={"name": "timm/vit_tiny_patch16_224", **VISION},
        projector={"pooler": {"dim": 16, "num_queries": 4, "num_heads": 2}, "mlp": {"depth": 2}},
        language_model={"config": {"model_type": "llama", **LLAMA, "vocab_size": 96, "tie_word_embeddings": tied}},
        trainable=trainable,
        frozen_dtype=dtype,
    )


@pytest.fixture(scope="module")
def model() -> PathMLLM:
    return build(["projector"])


def tops(names: set[str], depth: int) -> set[str]:
    return {".".join(name.split(".")[:depth]) for name in names}


def test_a_module_is_picked_whole(model: PathMLLM) -> None:
    assert pick(model, "projector", "x") == {f"projector.{name}" for name, _ in model.projector.named_parameters()}


@pytest.mark.parametrize("pattern", ["language_model.layers.[9-11].*", "language_model.model.layers.[9,10-11]"])
def test_numbers_in_brackets_are_numbers_not_letters(model: PathMLLM, pattern: str) -> None:
    assert tops(pick(model, pattern, "x"), 4) == {f"language_model.model.layers.{number}" for number in (9, 10, 11)}


def test_a_number_is_no_beginning_of_another(model: PathMLLM) -> None:
    assert tops(pick(model, "language_model.layers.1", "x"), 4) == {"language_model.model.layers.1"}


def test_a_star_stands_for_any_letters_within_names(model: PathMLLM) -> None:
    found = pick(model, "language_model.layers.*.self_attn.[qv]_proj".replace("[qv]", "*"), "x")
    assert len(found) == 12 * 4 and all(".self_attn." in name for name in found)
    assert tops(pick(model, "vision_encoder.blocks.[1-2].*", "x"), 4) == {
        f"vision_encoder.trunk.blocks.{number}" for number in (1, 2)
    }


def test_open_clips_blocks_are_blocks_too() -> None:
    vision = {"name": "open_clip/ViT-B-32", "kwargs": {"layers": 2, "width": 64, "head_width": 32}}
    llm = {"config": {"model_type": "llama", **LLAMA, "vocab_size": 96}}
    model = assemble_model(
        vision_encoder=vision,
        projector={"type": "linear"},
        language_model=llm,
        trainable=["projector", "vision_encoder.blocks.1"],
    )
    trained = {name for name, p in model.vision_encoder.named_parameters() if p.requires_grad}
    block = {id(p) for p in model.vision_encoder.blocks[1].parameters()}
    assert trained and {id(p) for p in model.vision_encoder.parameters() if p.requires_grad} == block


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("language_model.layer.[0-3].*", "did you mean language_model.layers"),
        (
            "language_model.layers.[9-14].*",
            "'language_model.layers.12.*' of 'language_model.layers.[9-14].*' matches no",
        ),
        ("vision_encoder.block.1", "did you mean vision_encoder.blocks"),
        ("projecter.mlp", "did you mean projector?"),
        ("language_model.layers.[5-2]", "5-2 counts down: write 2-5"),
        ("language_model.layers.[0-999999999]", "names more than 10,000"),
        ("language_model.layers.[a-b]", "is no pattern"),
        ("language_model..layers", "is no pattern"),
        ("", "it must be, or begin with, one of vision_encoder"),
    ],
)
def test_what_matches_nothing_is_refused_with_the_nearest(model: PathMLLM, pattern: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"model\.trainable") as error:
        pick(model, pattern, "model.trainable")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_many_stars_take_no_longer(model: PathMLLM) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match="matches no weight"):
        pick(model, "language_model." + "*a" * 40 + "*zz", "x")
    assert time.process_time() - start < 5
    check_pattern("language_model.*")


def test_a_pattern_that_adds_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'language_model\.layers\.1' adds nothing"):
        build(["language_model", "language_model.layers.1"])


def test_a_unit_with_anything_trained_is_fp32_and_the_others_take_the_compute_dtype() -> None:
    model = build(["projector", "language_model.layers.11.self_attn", "vision_encoder.blocks.2"], torch.bfloat16)
    layers, blocks = model.language_model.model.layers, model.vision_encoder.blocks
    dtypes = lambda module: {p.dtype for p in module.parameters()}  # noqa: E731
    assert dtypes(layers[11]) == dtypes(blocks[2]) == dtypes(model.projector) == {torch.float32}
    assert dtypes(layers[:11]) == dtypes(blocks[:2]) == {torch.bfloat16}
    assert dtypes(model.language_model.lm_head) == dtypes(model.language_model.model.norm) == {torch.bfloat16}
    assert {n.split(".")[2] for n, p in layers.named_parameters(prefix="x") if p.requires_grad} == {"self_attn"}


def test_a_tied_head_is_trained_under_both_its_names() -> None:
    model = build(["language_model.lm_head"], torch.bfloat16, tied=True)
    assert model.language_model.get_input_embeddings().weight.requires_grad
