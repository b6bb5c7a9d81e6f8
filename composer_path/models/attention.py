"""Padding-free causal attention: many samples lie in one row, and none sees another.

The functions are registered with transformers' attention interface, so any language model that goes through it
(LLaMA, Mistral, Qwen, ...) uses them without a change. The row's borders travel as `cu_seq_lens_q` (int32, one more
than samples, starting at 0) and `max_length_q`, transformers' own names. No mask is ever built: these names are not
in transformers' mask registry, which makes it hand over `attention_mask=None`.

Legend: t = tokens of the row, h = query heads, k = key/value heads, d = width of a head.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from composer_path.models.language_types import decoder_of, padded_attention

AttentionBackend = Literal["auto", "flash_attn", "flash_attn_3", "flash_attn_4", "torch_flash", "sdpa"]
KERNELS = {"packed_flash_attn": "the flash-attn package", "packed_sdpa": "one causal attention a sample"}
_TORCHS_FLASH = "packed_torch_flash"

_VARLEN = "torch.nn.attention.varlen"  # from torch 2.10 on
varlen_attn: Any = import_module(_VARLEN).varlen_attn if find_spec(_VARLEN) else None


def resolve_attention(backend: AttentionBackend, device_type: str | None = None) -> str:
    """Name of the registered attention function for a backend, refused where it can't run.

    `auto` takes torch's own flash kernel on CUDA: its public `varlen_attn`, before torch 2.10 the flash-attn package
    where that can be imported, else torch's operator. Without CUDA it takes one causal attention per sample.
    `flash_attn_3` and `flash_attn_4` have torch call the kernels of these packages. `device_type` is by default what
    this machine has.
    """
    if backend not in get_args(AttentionBackend):
        raise ValueError(
            f"attention: unknown backend '{backend}'; choose one of {', '.join(get_args(AttentionBackend))}"
        )
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if backend == "auto" and device_type != "cuda":
        backend = "sdpa"
    elif backend == "auto":
        backend = "torch_flash" if varlen_attn is not None or not _has_flash_attn() else "flash_attn"
    if backend == "flash_attn" and not _has_flash_attn():
        raise ValueError(
            "attention: 'flash_attn' needs the package flash-attn, version 2 (pip install composer_path[gpu]); or use "
            "'auto'"
        )
    if backend != "sdpa" and device_type != "cuda":
        raise ValueError(f"attention: '{backend}' needs a CUDA device, found '{device_type}'; use 'auto' or 'sdpa'")
    if backend in ("flash_attn_3", "flash_attn_4"):
        _let_torch_call(backend)
        backend = "torch_flash"
    return f"packed_{backend}"


def _has_flash_attn() -> bool:
    """Whether the function can be imported: flash-attn-4 has a folder of the same name, without it."""
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except Exception:  # a build for another torch fails in ways of its own
        return False
    return True


def _let_torch_call(backend: str) -> None:
    """Have torch's flash operators run the kernels of a newer package."""
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if activate is None:
        raise ValueError(f"attention: '{backend}' needs torch 2.11, found {torch.__version__}; use 'auto'")
    try:
        activate("FA" + backend[-1])
    except Exception as error:
        raise ValueError(
            f"attention: '{backend}' can't be used here ({type(error).__name__}: {error}); install its package, or use "
            "'auto'"
        ) from error


def kernel_in_words(resolved: str) -> str:
    """What computes attention under a registered name."""
    if resolved != _TORCHS_FLASH:
        return KERNELS[resolved]
    if varlen_attn is None:
        return "torch's flash operator"
    activated = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    return f"torch's varlen_attn with {activated or 'its own kernels'}"


def pack_attention(language_model: PreTrainedModel) -> None:
    """Let calls that say where samples end use padding-free attention, and all others transformers' own.

    A forward with `cu_seq_lens_q` runs the function that the model was built with (or `auto`'s choice). One without,
    such as a padded batch or generation with a cache, is that of a stock transformers model: its `sdpa`, or `eager`
    where a model has soft-capped scores or sinks, which the former leaves out without a word.
    """
    chosen = str(language_model.config._attn_implementation)
    if not chosen.startswith("packed_"):
        chosen = resolve_attention("auto")
    softcap = getattr(language_model.config, "attn_logit_softcapping", None)
    if softcap is not None and chosen == _TORCHS_FLASH and _has_flash_attn():
        chosen = "packed_flash_attn"  # the one kernel that soft-caps
    padded: Any = padded_attention(language_model.config)
    language_model.packed_attention = chosen  # type: ignore[assignment]

    def choose(module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        packed = kwargs.get("cu_seq_lens_q") is not None
        wanted: Any = language_model.packed_attention if packed else padded
        if module.config._attn_implementation != wanted:
            module.config._attn_implementation = wanted

    for module in (language_model, decoder_of(language_model)):  # the second is also entered by itself, see PathMLLM
        module.register_forward_pre_hook(choose, with_kwargs=True)


def fill_row(
    inputs_embeds: Float[Tensor, "t hidden"],
    position_ids: Int64[Tensor, " t"],
    cu_seq_lens: Int32[Tensor, " borders"],
    max_seq_len: int,
    multiple: int,
) -> tuple[Float[Tensor, "filled hidden"], Int64[Tensor, " filled"], Int32[Tensor, " filled_borders"], int]:
    """A row filled up to a multiple of its tokens by one more sample that nobody looks at.

    Borders are filled up with empty samples to a multiple of 8, and the longest length is rounded up, so that the
    shapes that compiled kernels see repeat. Nothing real changes: attention stays inside samples.
    """
    missing = -inputs_embeds.shape[0] % multiple
    filler = torch.arange(missing, device=position_ids.device, dtype=position_ids.dtype)
    end = cu_seq_lens.new_full((1 + (-len(cu_seq_lens) - 1) % 8,), inputs_embeds.shape[0] + missing)
    return (
        F.pad(inputs_embeds, (0, 0, 0, missing)),
        torch.cat([position_ids, filler]),
        torch.cat([cu_seq_lens, end]),
        max_seq_len + -max_seq_len % multiple,
    )


def _borders(kwargs: dict[str, Any]) -> tuple[Int32[Tensor, " borders"], int]:
    """Take the row's borders from the attention call."""
    cu_seq_lens, max_length = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    if cu_seq_lens is None or max_length is None:
        raise ValueError(
            "padding-free attention needs cu_seq_lens_q and max_length_q; for padded batches use attention 'sdpa'"
        )
    return cu_seq_lens, int(max_length)


def _one_dtype(
    query: Float[Tensor, "1 h t d"], key: Float[Tensor, "1 k t d"], value: Float[Tensor, "1 k t d"]
) -> tuple[Float[Tensor, "1 h t d"], Float[Tensor, "1 k t d"], Float[Tensor, "1 k t d"]]:
    """Under autocast with fp32 weights RoPE returns fp32 queries and keys beside bf16 values: bring them together."""
    if query.device.type != "meta" and torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        return query.to(dtype), key.to(dtype), value.to(dtype)
    return query.to(value.dtype), key.to(value.dtype), value


def _no_flash(query: Float[Tensor, "1 h t d"]) -> bool:
    """Flash kernels take half precision on a GPU only; an fp32 run, or one on a GPU machine's CPU, does without.

    On the meta device, where memory is planned, the operator stands for any fused kernel.
    """
    if query.device.type == "meta":
        return False
    half = query.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(query.device.type)
    return query.device.type == "cpu" or not half


def packed_attention(
    backend: Literal["sdpa", "torch_flash", "flash_attn"],
    module: nn.Module,
    query: Float[Tensor, "1 h t d"],
    key: Float[Tensor, "1 k t d"],
    value: Float[Tensor, "1 k t d"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Float[Tensor, "1 t h d"], None]:
    """Causal attention inside each sample, as transformers calls it.

    `sdpa` is one scaled-dot-product attention per sample, which runs everywhere and is the CPU's fastest exact way.
    The others are variable-length kernels for CUDA: torch's own (its public function, or before torch 2.10 and on the
    meta device its operator, whose schema is pinned by a test), and the flash-attn package's. What they can't take
    falls back on `sdpa`.
    """
    cu_seq_lens, max_length = _borders(kwargs)
    window, softcap, sinks = (kwargs.get(key) for key in ("sliding_window", "softcap", "s_aux"))
    window = None if window is None or window >= max_length else int(window)  # one that long never cuts
    public = backend == "torch_flash" and varlen_attn is not None and query.device.type != "meta"
    beyond = sinks is not None or (softcap is not None and backend != "flash_attn")
    falls_back = _no_flash(query) or (public and dropout > 0) or (beyond and query.device.type != "meta")
    query, key, value = _one_dtype(query, key, value)
    if backend == "sdpa" or falls_back:
        if (groups := query.shape[1] // key.shape[1]) > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        attend = functools.partial(_attend_exactly, softcap=softcap, sinks=sinks) if beyond else _attend
        attend = functools.partial(attend, dropout=dropout, scale=scaling, window=window)
        return _attend_each_sample(attend, query, key, value, cu_seq_lens).transpose(1, 2), None
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # [t, heads, d]
    row = (q, k, v, cu_seq_lens, cu_seq_lens, max_length, max_length)
    if public:
        return varlen_attn(*row, scale=scaling, **_causal(q.shape[1] != k.shape[1], window))[None], None
    sides = (-1, -1) if window is None else (window - 1, 0)
    if backend == "torch_flash":
        cut = {} if window is None else dict(zip(("window_size_left", "window_size_right"), sides, strict=True))
        return torch.ops.aten._flash_attention_forward(*row, dropout, True, False, scale=scaling, **cut)[0][None], None
    from flash_attn import flash_attn_varlen_func

    more = {} if softcap is None else {"softcap": softcap}
    more |= {} if window is None else {"window_size": sides}
    return flash_attn_varlen_func(*row, dropout, softmax_scale=scaling, causal=True, **more)[None], None


@functools.cache
def _causal(grouped: bool, window: int | None = None) -> dict[str, Any]:
    """How this torch's `varlen_attn` is told that no token looks ahead, how far back, and that key heads are shared."""
    known = inspect.signature(varlen_attn).parameters
    if window is not None and "window_size" not in known:
        raise ValueError(f"attention: torch {torch.__version__} knows no sliding window here; use 'sdpa'")
    behind = -1 if window is None else window - 1
    told: dict[str, Any] = {"window_size": (behind, 0)} if "window_size" in known else {"is_causal": True}
    return told | ({"enable_gqa": True} if grouped and "enable_gqa" in known else {})


@torch.compiler.disable  # how many samples there are is known only when it runs
def _attend_each_sample(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor, cu_seq_lens: Tensor
) -> Tensor:
    lengths = [length for length in torch.diff(cu_seq_lens).tolist() if length]  # empty samples fill a row up
    parts = [
        attend(q, k, v)
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(parts, dim=2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float | None, window: int | None
) -> Tensor:
    """One sample by torch's own operator; with a mask only where a window cuts."""
    if window is None or window >= query.shape[2]:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scale)
    seen = _seen(query.shape[2], window, query.device)
    return F.scaled_dot_product_attention(query, key, value, seen, dropout_p=dropout, scale=scale)


def _attend_exactly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Float[Tensor, " h"] | None,
) -> Tensor:
    """One sample by the definition, for what no operator computes: soft-capped scores, and sinks that take a share."""
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    length = query.shape[2]
    scores = scores.masked_fill(~_seen(length, length if window is None else window, query.device), float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(scores.shape[0], -1, length, 1)
        scores = torch.cat([scores, column], dim=3)
    shares = scores.float().softmax(3).to(value.dtype)[..., :length]
    return F.dropout(shares, dropout) @ value


def _seen(length: int, window: int, device: torch.device) -> Bool[Tensor, "t t"]:
    """Which tokens each token looks at: itself and those before it, `window` of them at most."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < window)


for _backend in ("sdpa", "torch_flash", "flash_attn"):
    AttentionInterface.register(f"packed_{_backend}", functools.partial(packed_attention, _backend))
