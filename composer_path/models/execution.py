"""How a step is computed, never what: levers that trade memory against time and leave its results as they are."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from composer_path.models.language_model import decoder_blocks
from composer_path.models.path_mllm import PathMLLM

Checkpointing = Literal["off", "selective", "full"]
Fusion = Literal["off", "compile", "liger"]
# What `selective` keeps: products of matrices and attention. All else is cheap to do again.
KEPT = re.compile(
    r"aten::(mm|addmm|bmm|_flash_attention_forward|_scaled_dot_product_\w+)|flash_attn::_flash_attn_varlen_forward"
)
# Heads whose logits are more than a product with one matrix; `loss_chunk` computes just that.
SCALED_HEADS = [
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "mup_width_multiplier",
]


def choose_execution(
    model: PathMLLM,
    *,
    activation_checkpointing: Checkpointing | bool = "off",
    fusion: Fusion | bool = "off",
    vision_chunk: int | None = None,
    loss_chunk: int | None = None,
    row_multiple: int | None = None,
) -> PathMLLM:
    """Set the levers on a model, before it is sharded.

    Args:
        model: Changed in place.
        activation_checkpointing: What the backward pass recomputes in blocks that gradients pass: `off` nothing, `full`
            everything (a third more work, least memory), `selective` all but products of matrices and attention
            (hardly more work, about half the memory of `off`).
        fusion: Elementwise work of the language model's blocks in fewer kernels, equal to rounding: `off`, `compile`
            (torch.compile of each block) or `liger` (liger-kernel's RMSNorm, SwiGLU and RoPE; CUDA).
        vision_chunk: A frozen vision encoder's blocks take at most so many images at once; None for all.
        loss_chunk: Logits exist for at most so many answer tokens at once, and are recomputed in the backward pass;
            None for all at once.
        row_multiple: Rows are filled up to a multiple of so many tokens, so that compiled kernels see few shapes.

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
    if vision_chunk is not None and not vision_trained:
        for block in vision_blocks:
            block.forward = _in_chunks(block.forward, vision_chunk)
    if fused == "liger":
        _use_liger(model)
    if checkpointing != "off":
        for block in (*llm_blocks, *(vision_blocks if vision_trained else ())):
            block.forward = _recomputed(block.forward, checkpointing)
    if fused == "compile":
        for block in llm_blocks:
            block.forward = torch.compile(block.forward, dynamic=True)
    model.recomputes_blocks = checkpointing == "full"
    return model


def _word(key: str, value: str | bool, choices: tuple[str, ...]) -> str:
    value = "off" if value is False else str(value)  # YAML reads a bare off as false
    if value not in choices:
        raise ValueError(f"execution.{key}: unknown '{value}'; choose one of {', '.join(choices)}")
    return value


def _recomputed(forward: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """A block's forward pass whose activations are computed again in the backward pass.

    The block itself stays what it is: no wrapper changes the names of its weights, and FSDP's hooks stand outside.
    """
    selective = functools.partial(create_selective_checkpoint_contexts, _keep)
    keywords: dict[str, Any] = {"context_fn": selective} if kind == "selective" else {}

    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **keywords, **kwargs)

    return recomputed


def _keep(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Whether the result of an operator is kept for the backward pass."""
    kept = KEPT.fullmatch(operator.name().split(".")[0])
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


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
    if not torch.cuda.is_available():
        raise ValueError("execution.fusion: 'liger' needs a CUDA device; use 'compile' or 'off'")
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(language_model.config.model_type)
    if apply is None:
        raise ValueError(
            f"execution.fusion: liger-kernel doesn't know '{language_model.config.model_type}'; use 'compile' or 'off'"
        )
    wanted = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False}
    wanted["fused_linear_cross_entropy"] = False
    known = inspect.signature(apply).parameters
    apply(**{key: value for key, value in wanted.items() if key in known}, model=language_model)
