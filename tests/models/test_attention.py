"""Padding-free attention equals attention under a block-causal mask; what it can't compute is refused by name."""

from __future__ import annotations

import inspect
import itertools
import math
import sys
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from composer_path.models import attention
from composer_path.models.attention import (
    fill_row,
    pack_attention,
    packed_attention,
    resolve_attention,
)
from composer_path.models.language_model import untrained_language_model
from composer_path.weights import assembly

packed_sdpa, packed_torch_flash, packed_flash_attn = (
    partial(packed_attention, backend) for backend in ("sdpa", "torch_flash", "flash_attn")
)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
LENGTHS = (5, 1, 11, 7)
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}


def row(num_heads: int, num_kv_heads: int, width: int = 8, **keywords: Any) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), width) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    tensors = [torch.randn(shape, generator=generator).to(**keywords).requires_grad_() for shape in shapes]
    return tuple(tensors)


def borders(device: str = "cpu") -> dict[str, Any]:
    cu_seq_lens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32).to(device)
    return {"cu_seq_lens_q": cu_seq_lens, "max_length_q": max(LENGTHS)}


def block_causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """The definition: softmax of masked scores, heads of keys repeated, [1, t, h, d]."""
    sample = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    position = torch.arange(sum(LENGTHS))
    mask = (sample[:, None] == sample[None]) & (position[:, None] >= position[None])
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("scaling", [8**-0.5, 0.25])
def test_packed_sdpa_equals_a_block_causal_mask_in_output_and_gradients(heads: str, scaling: float) -> None:
    ours, theirs = row(*HEADS[heads]), row(*HEADS[heads])
    output, weights = packed_sdpa(nn.Module(), *ours, None, scaling=scaling, **borders())
    expected = block_causal(*theirs, scaling)
    assert weights is None
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)  # measured 5e-7
    pull = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    output.backward(pull)
    expected.backward(pull)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_a_change_in_one_sample_changes_no_other_and_nothing_before_it() -> None:
    query, key, value = (tensor.detach() for tensor in row(4, 2))
    before, _ = packed_sdpa(nn.Module(), query, key, value, None, **borders())
    at = LENGTHS[0] + LENGTHS[1] + 4  # the fifth token of the third sample
    key[:, :, at], value[:, :, at] = 3.0, -3.0
    after, _ = packed_sdpa(nn.Module(), query, key, value, None, **borders())
    changed = (before != after).flatten(2).any(2)[0].nonzero()[:, 0].tolist()
    assert changed == list(range(at, sum(LENGTHS[:3])))


def test_dropout_is_applied_when_asked_for() -> None:
    query, key, value = row(4, 4)
    torch.manual_seed(0)
    dropped, _ = packed_sdpa(nn.Module(), query, key, value, None, dropout=0.5, **borders())
    whole, _ = packed_sdpa(nn.Module(), query, key, value, None, dropout=0.0, **borders())
    assert not torch.equal(dropped, whole)


def test_under_autocast_queries_keys_and_values_come_to_one_dtype() -> None:
    query, key, value = row(4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = packed_sdpa(nn.Module(), query, key, value.bfloat16(), None, **borders())
    assert output.dtype == torch.bfloat16
    output, _ = packed_sdpa(nn.Module(), query, key, value.bfloat16(), None, **borders())
    assert output.dtype == torch.bfloat16


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cu_seq_lens_q": None}, "needs cu_seq_lens_q and max_length_q"),
        ({"max_length_q": None}, "needs cu_seq_lens_q and max_length_q"),
    ],
)
@pytest.mark.parametrize("function", [packed_sdpa, packed_torch_flash])
def test_a_call_that_it_does_not_compute_is_refused(function: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(nn.Module(), *row(4, 4), None, **(borders() | kwargs))


def windowed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int) -> torch.Tensor:
    """The definition, sample by sample and token by token: each sees itself and the `window - 1` before it."""
    tokens, starts = [], [0, *itertools.accumulate(LENGTHS)]
    for start, end in itertools.pairwise(starts):
        for at in range(start, end):
            seen = slice(max(start, at - window + 1), at + 1)
            scores = torch.einsum("hd,htd->ht", query[0, :, at], key[0, :, seen]) * query.shape[3] ** -0.5
            tokens.append(torch.einsum("ht,htd->hd", scores.softmax(-1), value[0, :, seen]))
    return torch.stack(tokens)[None]


@pytest.mark.parametrize("window", [1, 3, 10, 11, 500])
@pytest.mark.parametrize("function", [packed_sdpa, packed_torch_flash])
def test_a_sliding_window_cuts_inside_each_sample(function: Any, window: int) -> None:
    query, key, value = (tensor.detach() for tensor in row(4, 4))
    output, _ = function(nn.Module(), query, key, value, None, sliding_window=window, **borders())
    torch.testing.assert_close(output, windowed(query, key, value, window), rtol=1e-5, atol=1e-6)


def test_a_kernel_is_told_of_a_window_in_its_own_count(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {}

    def varlen_attn(*row: Any, scale: Any, window_size: tuple[int, int], enable_gqa: bool = False) -> torch.Tensor:
        told["window_size"] = window_size
        return row[0]

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "_no_flash", lambda query: False)
    attention._causal.cache_clear()
    for window, expected in ((4, (3, 0)), (11, (-1, 0)), (None, (-1, 0))):
        packed_torch_flash(nn.Module(), *row(4, 4), None, sliding_window=window, **borders())
        assert told["window_size"] == expected
    attention._causal.cache_clear()


@pytest.mark.parametrize("model_type", ["bloom", "mamba", "falcon", "mpt"])
def test_models_that_leave_the_attention_interface_out_are_refused_by_name(model_type: str) -> None:
    with pytest.raises(ValueError, match=f"language model '{model_type}' (does not go through|uses|was never)"):
        untrained_language_model(config={"model_type": model_type})


# --- which function runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "device", "installed", "expected"),
    [
        ("auto", "cpu", True, "packed_sdpa"),
        ("auto", "cuda", False, "packed_torch_flash"),
        ("auto", "mps", False, "packed_sdpa"),
        ("sdpa", "cpu", False, "packed_sdpa"),
        ("sdpa", "cuda", True, "packed_sdpa"),
        ("torch_flash", "cuda", True, "packed_torch_flash"),
        ("flash_attn", "cuda", True, "packed_flash_attn"),
    ],
)
def test_each_backend_becomes_its_function(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: str, installed: bool, expected: str
) -> None:
    install_flash_attn(monkeypatch, installed)
    assert resolve_attention(backend, device) == expected


def install_flash_attn(monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    """The package, or that of flash-attn-4: a folder of the same name without the function."""
    package = ModuleType("flash_attn")
    if whole:
        package.flash_attn_varlen_func = lambda *args, **kwargs: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)


@pytest.mark.parametrize("public", [True, False])
def test_auto_prefers_torchs_public_function_then_the_package(monkeypatch: pytest.MonkeyPatch, public: bool) -> None:
    install_flash_attn(monkeypatch, True)
    monkeypatch.setattr(attention, "varlen_attn", (lambda: None) if public else None)
    assert resolve_attention("auto", "cuda") == ("packed_torch_flash" if public else "packed_flash_attn")


@pytest.mark.parametrize("version", ["3", "4"])
def test_a_newer_kernel_is_called_by_torch_or_refused_by_name(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", asked.append, raising=False)
    assert resolve_attention(f"flash_attn_{version}", "cuda") == "packed_torch_flash"  # type: ignore[arg-type]
    assert asked == [f"FA{version}"]

    def fail(name: str) -> None:
        raise ModuleNotFoundError(f"no {name}")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", fail)
    with pytest.raises(ValueError, match=f"'flash_attn_{version}' can't be used here .*no FA{version}"):
        resolve_attention(f"flash_attn_{version}", "cuda")  # type: ignore[arg-type]
    monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl")
    with pytest.raises(ValueError, match="needs torch 2\\.11"):
        resolve_attention(f"flash_attn_{version}", "cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["flash_attn", "torch_flash", "sdpa"])
def test_a_log_can_say_which_kernel_runs(backend: str) -> None:
    assert len(attention.kernel_in_words(f"packed_{backend}")) > 10


def test_an_attention_that_can_not_run_is_refused_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "build_vision_encoder", None)
    with pytest.raises(ValueError, match=r"needs a CUDA device|needs the package"):
        assembly.assemble_model(
            vision_encoder={}, projector={}, language_model={}, trainable=["projector"], attention="flash_attn"
        )


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("backend", "device", "installed", "message"),
    [
        ("eager", "cpu", False, "unknown backend 'eager'; choose one of auto, flash_attn, flash_attn_3, "),
        ("flash_attn", "cuda", False, "needs the package flash-attn"),
        ("flash_attn", "cpu", True, "'flash_attn' needs a CUDA device, found 'cpu'"),
        ("torch_flash", "cpu", True, "'torch_flash' needs a CUDA device, found 'cpu'"),
    ],
)
def test_backends_that_can_not_run_here_are_refused(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: str, installed: bool, message: str
) -> None:
    install_flash_attn(monkeypatch, installed)
    with pytest.raises(ValueError, match=message):
        resolve_attention(backend, device)


def test_rows_with_borders_take_the_packed_function_and_others_transformers_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    calls = []

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["cu_seq_lens_q"])
        return packed_sdpa(*args, **kwargs)

    model = untrained_language_model(config={"model_type": "llama", **SIZES})
    pack_attention(model)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "packed_sdpa", count)
    ids = torch.arange(3, 27)[None]
    model(input_ids=ids)
    assert calls == []
    model(input_ids=ids, use_cache=False, **borders())
    assert len(calls) == SIZES["num_hidden_layers"]
    model(input_ids=ids)
    assert len(calls) == SIZES["num_hidden_layers"]


# --- the private operator --------------------------------------------------------------------------------------------


def test_torchs_flash_operator_has_the_arguments_that_are_given_by_position() -> None:
    """Tells when torch changes its private operator; the installed package needs no GPU for that."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    names = [argument.name for argument in schema.arguments]
    assert names[:10] == [
        "query",
        "key",
        "value",
        "cum_seq_q",
        "cum_seq_k",
        "max_q",
        "max_k",
        "dropout_p",
        "is_causal",
        "return_debug_mask",
    ]
    assert "scale" in names and next(a for a in schema.arguments if a.name == "scale").kwarg_only
    assert all(a.has_default_value() for a in schema.arguments[10:])
    assert schema.returns[0].name == "output"
    backward = [argument.name for argument in torch.ops.aten._flash_attention_backward.default._schema.arguments]
    assert backward[:6] == ["grad_out", "query", "key", "value", "out", "logsumexp"]


def plain_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What torch's public function promises, by its documentation; it runs on a GPU only."""
    assert window_size == (-1, 0) and max_q == max_k == max(LENGTHS) and torch.equal(cu_seq_q, cu_seq_k)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert scale is not None
    return block_causal(*(x.transpose(0, 1)[None] for x in (query, key, value)), scale)[0]


@pytest.mark.parametrize("heads", HEADS)
def test_torchs_public_function_gets_what_it_documents(monkeypatch: pytest.MonkeyPatch, heads: str) -> None:
    monkeypatch.setattr(attention, "varlen_attn", plain_varlen)
    monkeypatch.setattr(attention, "_no_flash", lambda query: False)
    attention._causal.cache_clear()
    tensors = row(*HEADS[heads])
    output, _ = packed_torch_flash(nn.Module(), *tensors, None, scaling=0.3, **borders())
    attention._causal.cache_clear()
    torch.testing.assert_close(output, block_causal(*tensors, 0.3), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(attention.varlen_attn is None, reason="torch has it from 2.10 on")
def test_torchs_public_function_still_takes_what_we_give() -> None:
    ours, theirs = (inspect.signature(function).parameters for function in (plain_varlen, attention.varlen_attn))
    assert list(theirs)[:7] == list(ours)[:7]
    assert "scale" in theirs and ("window_size" in theirs or "is_causal" in theirs)
    assert not attention.varlen_attn.__doc__ or "causal" in attention.varlen_attn.__doc__


@pytest.mark.parametrize("heads", HEADS)
def test_torchs_flash_operator_takes_and_returns_these_shapes_forward_and_backward(
    monkeypatch: pytest.MonkeyPatch, heads: str
) -> None:
    """On torch's shape-only device, which knows the operator but not autocast."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    tensors = [tensor.detach().requires_grad_() for tensor in row(*HEADS[heads], device="meta", dtype=torch.bfloat16)]
    output, weights = packed_torch_flash(nn.Module(), *tensors, None, scaling=0.5, **borders("meta"))
    assert output.shape == (1, sum(LENGTHS), HEADS[heads][0], 8) and output.dtype == torch.bfloat16
    assert weights is None
    output.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.shape == tensor.shape for tensor in tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("function", [packed_torch_flash, packed_flash_attn])
def test_the_kernels_of_a_gpu_equal_a_block_causal_mask(function: Any, heads: str) -> None:
    if function is packed_flash_attn:
        pytest.importorskip("flash_attn")
    num_heads, num_kv_heads = HEADS[heads]
    ours = row(num_heads, num_kv_heads, 64, device="cuda", dtype=torch.bfloat16)
    theirs = tuple(tensor.detach().float().cpu().requires_grad_() for tensor in ours)
    output, _ = function(nn.Module(), *ours, None, scaling=0.125, **borders("cuda"))
    expected = block_causal(*theirs, 0.125)
    torch.testing.assert_close(output.float().cpu(), expected, rtol=2e-2, atol=2e-2)
    pull = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    output.backward(pull.to(output))
    expected.backward(pull)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad.float().cpu(), other.grad, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 23])
def test_a_filled_row_has_a_multiple_of_tokens_and_of_borders(length: int) -> None:
    embeds, borders = torch.ones(length, 4), torch.tensor([0, 1, length], dtype=torch.int32)
    filled, positions, ends, longest = fill_row(embeds, torch.arange(length), borders, length, 8)
    wanted = 8 * math.ceil(length / 8)
    assert filled.shape == (wanted, 4) and positions.shape == (wanted,) and longest == wanted
    assert torch.equal(filled[:length], embeds) and not filled[length:].any()
    assert len(ends) % 8 == 0 and ends[:3].tolist() == [0, 1, length] and ends[-1] == wanted
