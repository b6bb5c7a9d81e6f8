"""How a step is computed, never what: levers that trade memory against time and leave its results as they are."""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable
from types import MethodType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from composer_path.models.language_types import decoder_blocks
from composer_path.models.lora import is_adapter, is_dora
from composer_path.models.path_mllm import PathMLLM
from composer_path.models.rounded_linear import Rounding, hold_rounded

Checkpointing = Literal["off", "selective", "full"]
Fusion = Literal["off", "compile", "liger"]
# What `selective` keeps: products of matrices and attention. All else is cheap to do again.
KEPT = re.compile(
    r"aten::(mm|addmm|bmm|_flash_attention_forward|_scaled_dot_product_\w+)"
    r"|flash_attn::_flash_attn_varlen_forward|torch_attn::_varlen_attn"
)
FROZEN_ONLY = "it must be null where language_model is trained; leave it out of this stage"
NO_DORA = "DoRA reads the weights beside its adapters whole; leave out model.lora.language_model.use_dora, or this"
# Heads whose logits are more than a product with one matrix; `loss_chunk` computes just that.
SCALED_HEADS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "mup_width_multiplier",
)


def choose_execution(
    model: PathMLLM,
    *,
    activation_checkpointing: Checkpointing | bool = "off",
    fusion: Fusion | bool = "off",
    vision_chunk: int | None = None,
    loss_chunk: int | None = None,
    row_multiple: int | None = None,
    frozen_weights: Rounding | None = None,
) -> PathMLLM:
    """Set the levers on a model, before it is sharded.

    Args:
        model: Changed in place.
        activation_checkpointing: What the backward pass recomputes in blocks that gradients pass: `off` nothing, `full`
            everything (a third more work, least memory), `selective` all but products of matrices and attention
            (hardly more work, about half the memory of `off`).
        fusion: Elementwise work in fewer kernels, equal to rounding: `off`, `compile` (torch.compile of each block of
            language model and vision encoder) or `liger` (liger-kernel's RMSNorm and SwiGLU in the language model;
            CUDA).
        vision_chunk: A frozen vision encoder's blocks take at most so many images at once; None for all.
        loss_chunk: Logits exist for at most so many answer tokens at once, and are recomputed in the backward pass;
            None for all at once.
        row_multiple: Rows are filled up to a multiple of so many tokens, so that compiled kernels see few shapes.
        frozen_weights: The linear layers of a frozen language model's blocks, beside LoRA's adapters too, in half the
            bytes (`float8`, `int8`) or in a quarter (`nf4`, QLoRA's). The one lever that changes what is computed:
            weights are rounded (`composer_path.models.rounded_linear`). None keeps them as read.

    Raises:
        ValueError: Unknown words, numbers below 1, or a lever that this model or machine can't use.
    """
    checkpointing = _word("activation_checkpointing", activation_checkpointing, get_args(Checkpointing))
    fused = _word("fusion", fusion, get_args(Fusion))
    for name, value in (("vision_chunk", vision_chunk), ("loss_chunk", loss_chunk), ("row_multiple", row_multiple)):
        if value is not None and value < 1:
            raise ValueError(f"execution.{name}: found {value}; it must be at least 1")
    config = model.language_model.config
    scaled = [key for key in SCALED_HEADS if getattr(config, key, None) not in (None, 1.0)]
    if loss_chunk is not None and scaled:
        raise ValueError(
            f"execution.loss_chunk: language model '{config.model_type}' does more to its logits than one product "
            f"({', '.join(scaled)}); leave loss_chunk out"
        )
    model.loss_chunk, model.row_multiple = loss_chunk, row_multiple
    vision_trained = any(parameter.requires_grad for parameter in model.vision_encoder.parameters())
    llm_blocks, vision_blocks = decoder_blocks(model.language_model), model.vision_encoder.blocks
    if frozen_weights is not None:
        if any(p.requires_grad and not is_adapter(name) for name, p in model.language_model.named_parameters()):
            raise ValueError(f"execution.frozen_weights: found {frozen_weights}; {FROZEN_ONLY}")
        if any(is_dora(layer) for layer in model.language_model.modules() if hasattr(layer, "use_dora")):
            raise ValueError(f"execution.frozen_weights: found {frozen_weights}; {NO_DORA}")
        hold_rounded(llm_blocks, frozen_weights)
    if fused == "liger":
        _use_liger(model)
    if checkpointing != "off":
        for block in (*llm_blocks, *(vision_blocks if vision_trained else ())):
            block.forward = MethodType(_RECOMPUTED[checkpointing], block)
    if fused == "compile":
        for block in (*llm_blocks, *vision_blocks):
            block.forward = torch.compile(block.forward, dynamic=True)
    if vision_chunk is not None and not vision_trained:
        for block in vision_blocks:
            block.forward = _in_chunks(block.forward, vision_chunk)
    model.recomputes_blocks = checkpointing == "full"
    return model


def hold_frozen_units(model: PathMLLM, dtype: torch.dtype) -> None:
    """Hold in `dtype` what is frozen, in whole FSDP units: one with anything trained in it stays as it is."""
    taken: set[nn.Parameter] = set()
    for unit in reversed([model, *(module for module in model.modules() if model.fsdp_wrap_fn(module))]):
        own = [parameter for parameter in unit.parameters() if parameter not in taken]
        taken.update(own)
        if not any(parameter.requires_grad for parameter in own):
            for parameter in own:
                parameter.data = parameter.data.to(dtype)


def _word(key: str, value: str | bool, choices: tuple[str, ...]) -> str:
    value = "off" if value is False else str(value)  # YAML reads a bare off as false
    if value not in choices:
        raise ValueError(f"execution.{key}: unknown '{value}'; choose one of {', '.join(choices)}")
    return value


def _recompute(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A block's forward pass whose activations are computed again in the backward pass.

    The block itself stays what it is: no wrapper changes the names of its weights, and FSDP's hooks stand outside. One
    function is bound to all blocks, as torch.compile counts graphs by function and leaves those beyond its limit eager.
    """
    if not torch.is_grad_enabled():
        return type(block).forward(block, *args, **kwargs)
    return checkpoint(type(block).forward, block, *args, use_reentrant=False, **kwargs)


def _recompute_selectively(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The same, but for what `_keep` keeps."""
    if not torch.is_grad_enabled():
        return type(block).forward(block, *args, **kwargs)
    return checkpoint(type(block).forward, block, *args, use_reentrant=False, context_fn=_selection, **kwargs)


def _selection() -> Any:
    return create_selective_checkpoint_contexts(_keep)


def _keep(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Whether the result of an operator is kept for the backward pass."""
    kept = KEPT.fullmatch(operator.name().split(".")[0])
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_RECOMPUTED = {"full": _recompute, "selective": _recompute_selectively}


def _in_chunks(forward: Callable[[Tensor], Tensor], size: int) -> Callable[[Tensor], Tensor]:
    """A vision block's forward pass over a few images at a time.

    Chunks are made inside each block, not around the encoder: under FSDP every rank must enter a block equally often.
    """

    @functools.wraps(forward)
    def in_chunks(images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if images.shape[0] <= size:
            return forward(images, *args, **kwargs)
        return torch.cat([forward(part, *args, **kwargs) for part in images.split(size)])

    return in_chunks


def _use_liger(model: PathMLLM) -> None:
    """Put liger-kernel's fused layers into the language model; loss and head stay ours."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise ValueError("execution.fusion: 'liger' needs liger-kernel (pip install composer_path[liger])") from error
    language_model = model.language_model
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":  # which runs kernels in Python
        raise ValueError("execution.fusion: 'liger' needs a CUDA device; use 'compile' or 'off'")
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(language_model.config.model_type)
    if apply is None:
        raise ValueError(
            f"execution.fusion: liger-kernel doesn't know '{language_model.config.model_type}'; use 'compile' or 'off'"
        )
    # Its RoPE rotates in place what selective checkpointing keeps: the loss stays right, gradients don't. And it would
    # stay for every model that this process builds.
    wanted = {"rope": False, "rms_norm": True, "swiglu": True, "cross_entropy": False}
    wanted["fused_linear_cross_entropy"] = False
    known = inspect.signature(apply).parameters
    apply(**{key: value for key, value in wanted.items() if key in known}, model=language_model)
