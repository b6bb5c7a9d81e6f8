"""A batch's way from a loader's worker to the training process, in one piece of shared memory.

Sent as they are, its fifteen tensors would each need a file and a connection of their own, which costs more than
preparing a stored square does, and images would be copied once more. All of a batch's tensors then share memory, so
keeping one of them keeps its images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from composer_path.batches.memory_ring import Sent, own_ring, piece_of

_ALIGNMENT = 64  # bytes; each tensor starts at a multiple, as torch's own do


def in_one_piece(fields: Mapping[str, Any], kind: str, images: Sequence[Tensor]) -> dict[str, Any]:
    """A batch's fields, and each sample's images as the field `kind`, all tensors in one piece of shared memory.

    Raises:
        OSError: There is too little memory.
    """
    small = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    total = sum(map(_room, small.values())) + sum(tensor.nbytes for tensor in images)
    storage = own_ring().take(total).untyped_storage()
    shared, start = dict(fields), 0
    for name, value in small.items():
        shared[name] = _view(storage, value.dtype, value.shape, start).copy_(value)
        start += _room(value)
    shape = (sum(map(len, images)), *images[0].shape[1:])
    shared[kind] = torch.cat(list(images), out=_view(storage, images[0].dtype, shape, start))
    return shared


def pack(fields: Mapping[str, Any]) -> tuple[Sent | None, dict[str, tuple[Any, ...]], dict[str, Any]]:
    """What is sent: the shared memory that tensors lie in, their places in it, and all that doesn't lie there."""
    tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor) and value.is_cpu}
    sent = next((piece for value in tensors.values() if (piece := piece_of(value)) is not None), None)
    if sent is None:
        return None, {}, dict(fields)
    address = sent.tensor.data_ptr()
    places = {
        name: (value.dtype, value.shape, value.data_ptr() - address)
        for name, value in tensors.items()
        # An empty tensor has no address.
        if value.untyped_storage().data_ptr() == address and value.is_contiguous() and value.numel()
    }
    others = {name: value for name, value in fields.items() if name not in places}
    return sent, places, others


def unpack(memory: Sent | Tensor | None, places: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """The fields again."""
    tensor = memory.tensor if isinstance(memory, Sent) else memory  # the former in a copy of this process's own
    inside = {} if tensor is None else {name: _view(tensor.untyped_storage(), *at) for name, at in places.items()}
    return {**others, **inside}


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _view(storage: torch.UntypedStorage, dtype: torch.dtype, shape: Sequence[int], start: int) -> Tensor:
    """A tensor inside a piece of memory, `start` bytes from its beginning."""
    strides = torch.empty(tuple(shape), device="meta").stride()
    return torch.empty(0, dtype=dtype).set_(storage, start // dtype.itemsize, tuple(shape), strides)
