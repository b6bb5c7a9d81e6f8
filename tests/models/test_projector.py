"""The projector against the reference's outputs, open_clip's pooler, and every type that YAML can name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import open_clip.transformer
import pytest
import torch
from safetensors.torch import load_file

from composer_path.models.attentional_pooler import AttentionalPooler, OpenClipAttentionalPooler
from composer_path.models.projector import Projector, untrained_projector
from composer_path.weights.projector_file import from_reference_projector

SMALL = {"dim": 16, "num_queries": 5, "num_heads": 4}


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).abs().max() / expected.abs().max())


def test_projected_tokens_equal_the_references(golden: Path) -> None:
    expected = load_file(golden / "model" / "expected.safetensors")
    prefix = "model.mm_projector."
    weights = load_file(golden / "model" / "model.safetensors")
    projector = untrained_projector(in_dim=64, out_dim=64, type="attn_pool+mlp2x_gelu", pooler={"dim": 48})
    projector.load_state_dict(
        from_reference_projector({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    )
    projected = projector(expected["vision_features"])
    assert projected.shape == (4, 128, 64)
    assert relative_error(projected, expected["projected"]) < 1e-5  # measured 5.2e-7


def test_the_default_is_the_references_projector() -> None:
    with torch.device("meta"):
        projector = untrained_projector(in_dim=1024, out_dim=5120)
    shapes = {key: tuple(value.shape) for key, value in projector.state_dict().items()}
    assert shapes == {
        "pooler.query": (128, 768),
        "pooler.ln_k.weight": (1024,),
        "pooler.ln_k.bias": (1024,),
        "pooler.ln_q.weight": (768,),
        "pooler.ln_q.bias": (768,),
        "pooler.to_q.weight": (768, 768),
        "pooler.to_kv.weight": (1536, 1024),
        "pooler.to_out.weight": (768, 768),
        "ln.weight": (768,),
        "ln.bias": (768,),
        "mlp.0.weight": (5120, 768),
        "mlp.0.bias": (5120,),
        "mlp.2.weight": (5120, 5120),
        "mlp.2.bias": (5120,),
    }


@pytest.mark.parametrize(
    "arguments, num_image_tokens, num_layers",
    [
        ({"type": "attn_pool+mlp2x_gelu", "pooler": SMALL}, 5, 3),
        ({"type": "attn_pool+linear", "pooler": SMALL}, 5, 1),
        ({"type": "linear"}, 9, 1),
        ({"type": "mlp1x_gelu"}, 9, 1),
        ({"type": "mlp3x_gelu"}, 9, 5),
        ({"pooler": SMALL}, 5, 3),
        ({"pooler": {**SMALL, "kind": "open_clip"}, "mlp": {"depth": 1}}, 5, 1),
        ({"mlp": {"depth": 2}}, 9, 3),
    ],
)
def test_every_type_projects_and_counts_its_tokens(arguments: dict, num_image_tokens: int, num_layers: int) -> None:
    projector = untrained_projector(in_dim=24, out_dim=32, **arguments)
    output = projector(torch.randn(2, 9, 24))
    assert output.shape == (2, num_image_tokens, 32)
    assert projector.num_image_tokens(9) == num_image_tokens
    assert len(projector.mlp) == num_layers


def test_identity_changes_nothing() -> None:
    projector = untrained_projector(in_dim=24, out_dim=24, type="identity")
    features = torch.randn(2, 9, 24)
    assert torch.equal(projector(features), features)
    assert not list(projector.parameters())


def test_every_parameter_gets_a_gradient() -> None:
    for kind in ("reference", "open_clip"):
        projector = untrained_projector(in_dim=24, out_dim=32, pooler={**SMALL, "kind": kind})
        projector(torch.randn(2, 9, 24)).square().sum().backward()
        assert all(parameter.grad is not None for parameter in projector.parameters())


def test_the_queries_are_projected_once_for_all_images() -> None:
    pooler = AttentionalPooler(24, 16, 5, 4)
    inputs = []
    pooler.to_q.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    pooler(torch.randn(7, 9, 24))
    assert [tuple(x.shape) for x in inputs] == [(5, 16)]


@pytest.mark.parametrize("in_dim", [24, 16])  # nn.MultiheadAttention names its weights otherwise where the widths agree
def test_the_open_clip_pooler_equals_open_clips(in_dim: int) -> None:
    theirs = open_clip.transformer.AttentionalPooler(16, in_dim, n_head=4, n_queries=5)
    ours = OpenClipAttentionalPooler(in_dim, 16, 5, 4)
    ours.load_state_dict(theirs.state_dict())
    features = torch.randn(2, 9, in_dim)
    assert relative_error(ours(features), theirs(features)) < 1e-6  # measured 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"type": "attn_pool+mlp2x_gelu", "pooler": SMALL},
        {"pooler": {**SMALL, "kind": "open_clip"}, "mlp": {"depth": 1}},
        {"type": "mlp3x_gelu"},
    ],
)
def test_the_config_rebuilds_the_architecture(arguments: dict) -> None:
    projector = untrained_projector(in_dim=24, out_dim=32, **arguments)
    again = untrained_projector(**json.loads(json.dumps(projector.config)))
    again.load_state_dict(projector.state_dict())
    assert again.config == projector.config


def test_features_take_the_dtype_of_the_weights() -> None:
    projector = untrained_projector(in_dim=24, out_dim=32, pooler=SMALL)
    assert projector(torch.randn(2, 9, 24, dtype=torch.bfloat16)).dtype == torch.float32


def test_features_of_another_width_are_refused_with_both_widths() -> None:
    projector = untrained_projector(in_dim=24, out_dim=32, pooler=SMALL)
    with pytest.raises(ValueError, match="width 25 came in, but it was built for width 24"):
        projector(torch.randn(2, 9, 25))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"type": "mlp2x_relu"}, "unknown type 'mlp2x_relu'"),
        ({"type": "mlp0x_gelu"}, "unknown type"),
        ({"type": "linear", "pooler": {}}, "has no pooler, but 'pooler' is given"),
        ({"type": "linear", "mlp": {"depth": 2}}, "depth 1, but mlp.depth is 2"),
        ({"type": "identity"}, "24 comes in and the language model's width is 32"),
        ({"pooler": {"dim": 100}}, "dim 100 and num_heads 8"),
        ({"pooler": {"heads": 8}}, "unknown key 'heads'.*did you mean 'num_heads'"),
        ({"pooler": {"kind": "perceiver"}}, "must be one of .*'perceiver'"),
        ({"pooler": {"num_queries": 0}}, "num_queries: must be a whole number of at least 1, found 0"),
        ({"mlp": {"depth": -1}}, "at least 0, found -1"),
    ],
)
def test_mistakes_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        untrained_projector(in_dim=24, out_dim=32, **arguments)


@pytest.mark.parametrize("pooler", [None, {"dim": 16, "num_queries": 5, "num_heads": 4}])
def test_marks_stand_around_the_vectors_of_each_image_and_are_counted(pooler: dict[str, Any] | None) -> None:
    plain = untrained_projector(in_dim=24, out_dim=32, pooler=pooler, mlp={"depth": 1})
    marked = untrained_projector(in_dim=24, out_dim=32, pooler=pooler, mlp={"depth": 1}, image_marks=True)
    marked.load_state_dict(
        plain.state_dict() | {"marks": torch.stack([torch.full((32,), 3.0), torch.full((32,), 4.0)])}
    )
    features = torch.randn(2, 9, 24)
    vectors, expected = marked(features), plain(features)
    assert torch.equal(vectors[:, 1:-1], expected)
    assert (vectors[:, 0] == 3).all() and (vectors[:, -1] == 4).all()
    assert vectors.shape[1] == marked.num_image_tokens(9) == plain.num_image_tokens(9) + 2
    assert marked.config == plain.config | {"image_marks": True}
    assert untrained_projector(**marked.config).state_dict().keys() == marked.state_dict().keys()


def test_a_class_of_ones_own_that_counts_image_tokens_itself_takes_no_marks() -> None:
    class Counting(Projector):
        config: ClassVar[dict[str, Any]] = {}

        def project(self, features: torch.Tensor) -> torch.Tensor:
            return features[:, :1]

        def num_image_tokens(self, num_tokens: int) -> int:
            return 1

    assert Counting(8, 8)(torch.zeros(1, 4, 8)).shape == (1, 1, 8)  # as before there were marks
    with pytest.raises(ValueError, match=r"image_marks: .* found Counting\.num_image_tokens; call it num_vectors"):
        Counting(8, 8).mark_images()
