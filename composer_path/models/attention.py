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
import logging
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32, Int64
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import AttentionInterface

log = logging.getLogger(__name__)

AttentionBackend = Literal["auto", "flash_attn", "flash_attn_3", "flash_attn_4", "torch_flash", "sdpa"]
PADDED = "sdpa"  # transformers' own
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
    such as a padded batch or generation with a cache, is that of a stock transformers model.
    """
    chosen = str(language_model.config._attn_implementation)
    if not chosen.startswith("packed_"):
        chosen = resolve_attention("auto")
    language_model.packed_attention = chosen  # type: ignore[assignment]

    def choose(module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        packed = kwargs.get("cu_seq_lens_q") is not None
        wanted: Any = language_model.packed_attention if packed else PADDED
        if module.config._attn_implementation != wanted:
            module.config._attn_implementation = wanted

    for module in (language_model, language_model.base_model):  # the second is also entered by itself, see PathMLLM
        module.register_forward_pre_hook(choose, with_kwargs=True)


def check_attention_supported(config: PretrainedConfig, max_seq_len: int | None = None) -> None:
    """Refuse, by name, a language model whose attention does more than plain causal attention.

    A sliding window that is at least `max_seq_len` tokens long (or any, where `max_seq_len` is not known yet) never
    cuts and is accepted; the attention functions check the row they get once more.
    """
    refused = {
        "attn_logit_softcapping": "soft-capped attention logits",
        "attention_chunk_size": "chunked attention",
        "attention_sink": "attention sinks",
        "alibi": "ALiBi position biases",
        "layer_types": "layers of several attention kinds",
    }
    values = {key: getattr(config, key, None) for key in refused}
    kinds = set(values["layer_types"] or ()) - {"full_attention"}
    values["layer_types"] = sorted(kinds) if kinds != {"sliding_attention"} else None  # judged by its window below
    for key in (key for key, value in values.items() if value):
        raise ValueError(
            f"language model '{config.model_type}' uses {refused[key]} ({key}={values[key]}), which padding-free "
            "attention does not compute; choose a model with plain causal attention"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if max_seq_len is not None and positions is not None and max_seq_len > positions:
        log.warning("max_seq_len=%d is more than the %d positions the language model knows", max_seq_len, positions)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and max_seq_len is not None and window < max_seq_len:
        raise ValueError(
            f"language model '{config.model_type}' uses a sliding window of {window} tokens, shorter than "
            f"max_seq_len={max_seq_len}, which padding-free attention does not compute; "
            f"set max_seq_len to at most {window}"
        )


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
    """Take the row's borders from the attention call, checking that a sliding window would not cut any sample."""
    cu_seq_lens, max_length = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    if cu_seq_lens is None or max_length is None:
        raise ValueError(
            "padding-free attention needs cu_seq_lens_q and max_length_q; for padded batches use attention 'sdpa'"
        )
    window = kwargs.get("sliding_window")
    if window is not None and window < max_length:
        raise ValueError(f"a sample of {max_length} tokens is longer than the model's sliding window of {window}")
    if kwargs.get("softcap") is not None:
        raise ValueError("padding-free attention does not compute soft-capped logits")
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
    public = backend == "torch_flash" and varlen_attn is not None and query.device.type != "meta"
    falls_back = _no_flash(query) or (public and dropout > 0)
    query, key, value = _one_dtype(query, key, value)
    if backend == "sdpa" or falls_back:
        if (groups := query.shape[1] // key.shape[1]) > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return _attend_each_sample(query, key, value, cu_seq_lens, dropout, scaling).transpose(1, 2), None
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # [t, heads, d]
    row = (q, k, v, cu_seq_lens, cu_seq_lens, max_length, max_length)
    if public:
        return varlen_attn(*row, scale=scaling, **_causal(q.shape[1] != k.shape[1]))[None], None
    if backend == "torch_flash":
        return torch.ops.aten._flash_attention_forward(*row, dropout, True, False, scale=scaling)[0][None], None
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(*row, dropout, softmax_scale=scaling, causal=True)[None], None


@functools.cache
def _causal(grouped: bool) -> dict[str, Any]:
    """How this torch's `varlen_attn` is told that no token looks ahead, and that heads of keys are shared."""
    known = inspect.signature(varlen_attn).parameters
    told: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return told | ({"enable_gqa": True} if grouped and "enable_gqa" in known else {})


@torch.compiler.disable  # how many samples there are is known only when it runs
def _attend_each_sample(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_lens: Tensor, dropout: float, scaling: float | None
) -> Tensor:
    lengths = [length for length in torch.diff(cu_seq_lens).tolist() if length]  # empty samples fill a row up
    parts = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling)
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(parts, dim=2)


for _backend in ("sdpa", "torch_flash", "flash_attn"):
    AttentionInterface.register(f"packed_{_backend}", functools.partial(packed_attention, _backend))
