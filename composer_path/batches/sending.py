"""A batch's way from a loader's worker to the training process, in one piece of shared memory.

Sent as they are, its fifteen tensors would each need a file and a connection of their own, which costs more than
preparing a stored square does, and images would be copied once more. All of a batch's tensors then share memory, so
keeping one of them keeps its images.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import get_sharing_strategy

_ALIGNMENT = 64  # bytes; each tensor starts at a multiple, as torch's own do


def in_one_piece(fields: Mapping[str, Any], kind: str, images: Sequence[Tensor]) -> dict[str, Any]:
    """A batch's fields, and each sample's images as the field `kind`, all tensors in one piece of shared memory."""
    small = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    total = sum(map(_room, small.values())) + sum(tensor.nbytes for tensor in images)
    # As torch's own collating does; share_memory_() would copy memory that nothing has been written to yet.
    storage = torch.UntypedStorage._new_shared(max(total, _ALIGNMENT))
    shared, start = dict(fields), 0
    for name, value in small.items():
        shared[name] = _view(storage, value.dtype, value.shape, start).copy_(value)
        start += _room(value)
    shape = (sum(map(len, images)), *images[0].shape[1:])
    shared[kind] = _view(storage, images[0].dtype, shape, start)
    if get_sharing_strategy() == "file_descriptor":
        _write(storage, images, start)
    else:
        torch.cat(list(images), out=shared[kind])
    return shared


def pack(fields: Mapping[str, Any]) -> tuple[Tensor | None, dict[str, tuple[Any, ...]], dict[str, Any]]:
    """What is sent: the shared memory that tensors lie in, their places in it, and all that doesn't lie there."""
    tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    storage = next((value.untyped_storage() for value in tensors.values() if value.is_cpu and value.is_shared()), None)
    if storage is None:
        return None, {}, dict(fields)
    address = storage.data_ptr()
    places = {
        name: (value.dtype, value.shape, value.data_ptr() - address)
        for name, value in tensors.items()
        # An empty tensor has no address.
        if value.untyped_storage().data_ptr() == address and value.is_contiguous() and value.numel()
    }
    others = {name: value for name, value in fields.items() if name not in places}
    return torch.empty(0, dtype=torch.uint8).set_(storage), places, others


def unpack(memory: Tensor | None, places: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """The fields again."""
    inside = {} if memory is None else {name: _view(memory.untyped_storage(), *at) for name, at in places.items()}
    return {**others, **inside}


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _view(storage: torch.UntypedStorage, dtype: torch.dtype, shape: Sequence[int], start: int) -> Tensor:
    """A tensor inside a piece of memory, `start` bytes from its beginning."""
    strides = torch.empty(tuple(shape), device="meta").stride()
    return torch.empty(0, dtype=dtype).set_(storage, start // dtype.itemsize, tuple(shape), strides)


def _write(storage: torch.UntypedStorage, tensors: Sequence[Tensor], start: int) -> None:
    """Lay tensors behind each other into shared memory, by its file.

    That takes half the time of copying, where the processor has to ask for each new page by itself, and memory that
    runs out is an error instead of the worker's end by SIGBUS.

    Raises:
        OSError: There is too little shared memory.
    """
    file, _ = storage._share_fd_cpu_()
    for tensor in tensors:
        data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        while len(data):
            written = os.pwrite(file, data, start)
            data, start = data[written:], start + written
