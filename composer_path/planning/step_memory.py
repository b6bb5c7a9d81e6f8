"""How much memory a step's activations take, found by running the model without data.

On the meta device tensors have shapes and no content, so the step of a 13B takes seconds on a laptop. Every storage
that comes to life is counted until it dies; what is left is the peak.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from composer_path.models.path_mllm import PathMLLM


@dataclass(frozen=True)
class RowSize:
    """What a row holds: equally long samples."""

    samples: int
    tokens: int  # of each, images included
    targets: int  # answer tokens of each
    images: int  # of each


# What operators made on the meta device, by all that they go by there: the layers of a model are alike, and running an
# operator takes ten times as long as looking here.
_MADE: dict[Any, Any] = {}


class LiveBytes(TorchDispatchMode):
    """Within it, the bytes of tensors that operators made and that are still alive: now, and at most.

    Storages of `known` tensors, which were there before, aren't counted.
    """

    def __init__(self, known: Iterator[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, or repeat what it made of such tensors before, and note what there is now."""
        call = func, _described(args), _described(tuple((kwargs or {}).items()))
        known = _MADE.get(call)
        result = func(*args, **(kwargs or {})) if known is None else _alike(known)
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        fresh = {storage for tensor in tensors if (storage := tensor.untyped_storage()) not in self.seen}
        for storage in fresh:
            self.seen.add(storage)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._forget, storage.nbytes())
        self.peak = max(self.peak, self.now)
        if known is None and 0 < len(fresh) == len(tensors) and _repeatable(tensors, args, kwargs):
            _MADE[call] = _alike(result)
        return result

    def _forget(self, size: int) -> None:
        self.now -= size


def _described(value: Any) -> Any:
    """An operator's arguments without content."""
    if isinstance(value, Tensor):
        return value.dtype, value.device, value.shape, value.stride()
    return tuple(map(_described, value)) if isinstance(value, list | tuple) else (type(value), value)


def _alike(result: Any) -> Any:
    """A result again, in storages of its own."""
    if isinstance(result, Tensor):
        return torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="meta")
    return tuple(map(_alike, result)) if isinstance(result, list | tuple) else result


def _repeatable(made: list[Tensor], *arguments: Any) -> bool:
    """Whether `_alike` makes the same: nothing has content, is an argument's view or has memory to spare."""
    given = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    storages = [tensor.untyped_storage() for tensor in made]
    return (
        all(tensor.device.type == "meta" for tensor in (*made, *given))
        and {tensor.untyped_storage() for tensor in given}.isdisjoint(storages)
        and [storage.nbytes() for storage in storages] == [_alike(one).untyped_storage().nbytes() for one in made]
    )


@contextmanager
def _flash_on_meta() -> Iterator[None]:
    """Attention of vision encoder and pooler as the fused kernel keeps it; on meta, torch takes the plain one."""
    original = F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.device.type != "meta":
            return original(query, key, value, *args, **kwargs)
        causal, scale = kwargs.get("is_causal", False), kwargs.get("scale")
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)[0]

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def peak_of_step(model: PathMLLM, row: RowSize) -> int:
    """Bytes that forward and backward pass of a row take at most, beside parameters and their gradients.

    A gradient is counted until it is complete, as where it is handed on to its owner right away. The model lies on the
    meta device (see `to_meta`), or a real one.

    Raises:
        ValueError: It can't run without data, as mixtures of experts before transformers 5.
    """
    device = next(model.parameters()).device
    batch = _empty_batch(model, row, device)
    known = [*model.parameters(), *model.buffers(), *(value for value in batch.values() if isinstance(value, Tensor))]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(_drop_gradient) for parameter in trained]
    try:
        with _flash_on_meta(), LiveBytes(iter(known)) as live:
            model(**batch).sum().backward()
        return live.peak
    except NotImplementedError:  # which token meets which expert: no tensor without content says it
        kind = model.language_model.config.model_type
        rule = "its step must run without data to be planned, found experts that are chosen by the data"
        raise ValueError(f"language model '{kind}': {rule}; install transformers 5, or choose another model") from None
    finally:
        for hook in hooks:
            hook.remove()


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _empty_batch(model: PathMLLM, row: RowSize, device: torch.device) -> dict[str, Any]:
    """A row of this size; on a real device everything in it is 0."""
    size, total = model.vision_encoder.image_size, row.samples * row.tokens
    images = row.samples * row.images
    starts = torch.arange(row.samples, device=device)[:, None] * row.tokens
    placeholders = torch.arange(row.images * model.num_image_tokens(), device=device)
    answers = torch.arange(row.tokens - row.targets - 1, row.tokens - 1, device=device)
    return {
        "input_ids": torch.zeros(total, dtype=torch.int64, device=device),
        "position_ids": torch.arange(row.tokens, device=device).repeat(row.samples),
        "cu_seq_lens": torch.arange(0, total + 1, row.tokens, dtype=torch.int32, device=device),
        "max_seq_len": row.tokens,
        "pixel_values": torch.zeros((images, 3, size, size), dtype=torch.uint8, device=device),
        "image_index": (starts + placeholders).flatten(),
        "logits_index": (starts + answers).flatten(),
        "targets": torch.zeros(row.samples * row.targets, dtype=torch.int64, device=device),
    }


@contextmanager
def computing_in(model: PathMLLM, dtype: torch.dtype) -> Iterator[PathMLLM]:
    """Within it, all weights of a model on the meta device have the dtype that products are computed in."""
    before = {parameter: parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    for parameter in before:
        parameter.data = parameter.data.to(dtype)
    try:
        yield model
    finally:
        for parameter, was in before.items():
            parameter.data = parameter.data.to(was)


def to_meta(model: PathMLLM) -> PathMLLM:
    """The model without content, with the attention kernel of a GPU.

    Rotary embeddings stay on the CPU and hand over what they compute: they ask for autocast, which meta doesn't have.
    """
    rotary = [module for name, module in model.named_modules() if name.endswith(("rotary_emb", "rotary_emb_local"))]
    for module in model.modules():
        if module not in rotary:
            module._apply(lambda tensor: tensor.to("meta"), recurse=False)
    for module in rotary:
        module.forward = functools.partial(_rotate_on_cpu, module.forward)  # type: ignore[method-assign]
    model.language_model.packed_attention = "packed_torch_flash"  # type: ignore[assignment]
    return model


def _rotate_on_cpu(forward: Any, hidden: Tensor, position_ids: Tensor, *kind: Any, **kinds: Any) -> tuple[Tensor, ...]:
    """What a rotary embedding makes of one position, as large as for all of them."""
    *batch, length = position_ids.shape
    positions = torch.zeros((*batch, 1), dtype=position_ids.dtype)
    parts = (part.to(hidden.device) for part in forward(hidden.new_zeros((), device="cpu"), positions, *kind, **kinds))
    return tuple(part.expand(*part.shape[:-2], length, -1).contiguous() for part in parts)
