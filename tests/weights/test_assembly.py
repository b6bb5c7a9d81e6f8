"""The model put together from the YAML's section: independent random weights, dtypes, and what is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from composer_path import PathMLLM
from composer_path.weights.assembly import assemble_model

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
VISION = {
    "name": "timm/vit_tiny_patch16_224",
    "image_size": 32,
    "kwargs": {"embed_dim": 24, "depth": 2, "num_heads": 2},
}
PROJECTOR = {"pooler": {"dim": 16, "num_queries": 4, "num_heads": 2}, "mlp": {"depth": 2}}


def build(**changes: Any) -> PathMLLM:
    keywords = {
        "vision_encoder": VISION,
        "projector": PROJECTOR,
        "language_model": {"config": {"model_type": "llama", **SIZES}},
        "trainable": ["projector"],
    }
    return assemble_model(**(keywords | changes))


def differing(first: PathMLLM, second: PathMLLM) -> set[str]:
    """Modules whose weights differ."""
    states = first.state_dict(), second.state_dict()
    return {
        key.split(".")[0]
        for key in states[0].keys() & states[1].keys()
        if not torch.equal(states[0][key], states[1][key])
    }


def test_a_modules_random_weights_depend_on_the_seed_alone_not_on_its_neighbours() -> None:
    first = build()
    assert differing(first, build()) == set()
    assert differing(first, build(seed=18)) == {"vision_encoder", "projector", "language_model"}
    # another projector draws more or fewer numbers, and the language model stays the same
    other = build(projector={"type": "mlp3x_gelu"})
    assert "language_model" not in differing(first, other) and "vision_encoder" not in differing(first, other)
    other = build(vision_encoder=VISION | {"kwargs": {"embed_dim": 24, "depth": 4, "num_heads": 2}})
    assert differing(first, other) <= {"vision_encoder"}


def test_building_leaves_the_random_numbers_of_others_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    build()
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("trainable", [["projector"], ["projector", "language_model"], ["vision_encoder"], []])
def test_frozen_modules_take_the_compute_dtype_and_trained_ones_are_fp32(trainable: list[str]) -> None:
    model = build(trainable=trainable, frozen_dtype=torch.bfloat16)
    for name, child in model.named_children():
        trained = name in trainable
        assert {p.requires_grad for p in child.parameters()} == {trained}, name
        assert {p.dtype for p in child.parameters()} == {torch.float32 if trained else torch.bfloat16}, name
    assert {buffer.dtype for name, buffer in model.named_buffers() if name.endswith("inv_freq")} == {torch.float32}


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_marks_around_images_begin_as_the_mean_of_all_words_and_are_all_of_them_that_learns(kind: str) -> None:
    config = {"model_type": kind, **SIZES, "head_dim": 8} | ({"num_key_value_heads": 2} if kind == "gemma" else {})
    model = build(projector=PROJECTOR | {"image_marks": True}, language_model={"config": config})
    embedding: Any = model.language_model.get_input_embeddings()
    assert model.num_image_tokens() == 4 + 2
    ids = torch.tensor([3, *[-200] * 6, 5, 7])
    index = (ids < 0).nonzero()[:, 0]
    vectors = model.embed_tokens(ids, model.embed_images(torch.zeros(1, 3, 32, 32)), index)
    mean = embedding(torch.arange(96)).mean(0)  # as words come out of it, whatever it multiplies them by
    assert torch.allclose(vectors[1], mean, atol=1e-6) and torch.allclose(vectors[6], mean, atol=1e-6)
    vectors.square().sum().backward()
    assert model.projector.marks.grad.abs().sum() > 0 and embedding.weight.grad is None
    learning = {name.split(".")[0] for name, one in model.named_parameters() if one.requires_grad}
    assert learning == {"projector"}
    without = build(language_model={"config": config})
    assert differing(model, without) == set()  # of what both have: marks draw no random numbers


def test_widths_are_read_from_the_neighbours() -> None:
    model = build()
    assert model.projector(torch.zeros(1, 5, 24)).shape == (1, 4, 32)
    wider = build(language_model={"config": {"model_type": "llama", **SIZES, "hidden_size": 64}})
    assert wider.projector(torch.zeros(1, 5, 24)).shape == (1, 4, 64)


@pytest.mark.parametrize("tied", [False, True])
def test_an_empty_model_has_the_same_parameters_without_storage_and_reads_no_file(tied: bool) -> None:
    language_model = {"config": {"model_type": "llama", **SIZES, "tie_word_embeddings": tied}}
    full = build(language_model=language_model, frozen_dtype=torch.bfloat16)
    empty = build(
        language_model=language_model,
        frozen_dtype=torch.bfloat16,
        empty=True,
        vision_encoder=VISION | {"weights": "not/there.bin"},
        projector=PROJECTOR | {"weights": "not/there.safetensors"},
    )
    assert all(p.is_meta for p in empty.parameters())
    assert not any(buffer.is_meta for buffer in empty.buffers())
    described = [
        {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()} for model in (full, empty)
    ]
    assert described[0] == described[1]


def test_a_weights_file_that_is_not_there_is_an_error_on_the_rank_that_reads_it() -> None:
    with pytest.raises((ValueError, OSError), match="not/there"):
        build(projector=PROJECTOR | {"weights": "not/there.safetensors"})
