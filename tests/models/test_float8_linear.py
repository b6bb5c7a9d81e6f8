"""Frozen weights in float8: half the bytes, a rounding that is known, and gradients that pass."""

from __future__ import annotations

import pytest
import torch
from test_execution import STAGES, build, step
from torch import nn

from composer_path.models.execution import choose_execution
from composer_path.models.float8_linear import Float8Linear


def linear(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(48, 32, bias=bias).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_weight_is_rounded_to_three_bits_and_takes_one_byte(dtype: torch.dtype) -> None:
    plain = linear(dtype)
    layer = Float8Linear(plain)
    assert layer.weight.dtype == torch.uint8 and layer.weight.shape == plain.weight.shape
    largest = plain.weight.float().abs().amax(dim=1, keepdim=True)
    error = (layer.restored().float() - plain.weight.float()).abs()
    # Half of the last of 3 bits (and bf16's own rounding); the smallest ones have a fixed step.
    assert (error <= plain.weight.float().abs() / 15 + largest / 448 / 512).all()
    assert error.max() > 0


def test_zeros_stay_zeros_and_a_dtype_set_from_outside_changes_no_weight() -> None:
    plain = linear()
    plain.weight.data[5] = 0
    layer = Float8Linear(plain)
    before = layer.restored()
    assert (before[5] == 0).all() and before.isfinite().all()
    assert torch.equal(layer.to(torch.bfloat16).weight, Float8Linear(plain).weight)


@pytest.mark.parametrize("bias", [True, False])
def test_product_and_gradient_are_those_of_the_restored_weight_and_nothing_is_kept(bias: bool) -> None:
    layer, kept = Float8Linear(linear(bias=bias)), []
    values = torch.randn(2, 7, 48, requires_grad=True)
    weights = torch.randn(2, 7, 32)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        result = layer(values)
    assert {id(tensor) for tensor in kept} <= {id(layer.weight), id(layer.scale)}
    (result * weights).sum().backward()
    other = values.detach().clone().requires_grad_()
    expected = nn.functional.linear(other, layer.restored(), layer.bias)
    (expected * weights).sum().backward()
    assert torch.equal(result, expected)
    assert torch.allclose(values.grad, other.grad, rtol=1e-6, atol=1e-6)
    assert layer.weight.grad is None


def test_weights_are_rounded_as_torchaos_are() -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    theirs = nn.Sequential(linear(torch.bfloat16, bias=False))
    layer = Float8Linear(linear(torch.bfloat16, bias=False))
    quantization.quantize_(theirs, quantization.Float8WeightOnlyConfig())
    exact = linear(torch.bfloat16, bias=False).weight.float()
    errors = [(found.float() - exact).norm() for found in (layer.restored(), theirs[0].weight.dequantize())]
    assert 0.95 < errors[0] / errors[1] < 1.05


def frozen(**keywords: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return step(choose_execution(build(STAGES["stage 1"]), **keywords))


def test_the_projector_learns_nearly_the_same() -> None:
    expected_loss, expected = frozen()
    loss, gradients = frozen(frozen_weights="float8")
    assert loss.item() != expected_loss.item()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=0.01)
    assert gradients.keys() == expected.keys()
    flat, flat_expected = (torch.cat([one[name].flatten() for name in expected]) for one in (gradients, expected))
    moved = (flat - flat_expected).norm() / flat_expected.norm()
    assert 0 < moved < 0.1  # measured 0.041; of the loss 1e-5


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_what_is_computed_again_is_the_same(kind: str) -> None:
    expected_loss, expected = frozen(frozen_weights="float8")
    loss, gradients = frozen(frozen_weights="float8", activation_checkpointing=kind)
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_only_linear_layers_of_the_language_models_blocks_change() -> None:
    plain, model = build(STAGES["stage 1"]), choose_execution(build(STAGES["stage 1"]), frozen_weights="float8")
    sizes = [{name: p.numel() for name, p in one.named_parameters()} for one in (plain, model)]
    assert sizes[0] == sizes[1]
    changed = {name for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert len(changed) == 3 * 7
    assert all(name.startswith("language_model.") and "layers" in name and "norm" not in name for name in changed)


def test_a_trained_language_model_is_refused() -> None:
    with pytest.raises(ValueError, match="found float8; it must be null where language_model is trained"):
        choose_execution(build(STAGES["stage 2"]), frozen_weights="float8")


@pytest.mark.gpu
def test_on_a_gpu_it_is_what_it_is_on_a_cpu() -> None:
    layer, values = Float8Linear(linear(torch.bfloat16)), torch.randn(64, 48).bfloat16()
    there = layer(values.cuda()) if layer.cuda() else None
    assert torch.allclose(there.cpu().float(), layer.cpu()(values).float(), rtol=2e-2, atol=2e-2)
