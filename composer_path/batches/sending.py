"""A batch on its way from a loader's worker to the training process, in one piece of shared memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.multiprocessing import get_sharing_strategy

from composer_path.batches.microbatches import Batch


class SentBatch(Batch):
    """A batch that leaves a loader's worker in one piece of shared memory; where it arrives it is the plain dict.

    Sent as they are, its fifteen tensors would each need a file and a connection of their own, which costs more than
    preparing a stored square does, and images would be copied once more. All of a batch's tensors then share memory, so
    keeping one of them keeps its images.

    Args:
        batch: All but the images.
        images: Their key.
        pixels: What each sample has of them.
    """

    def __init__(self, batch: Mapping[str, Any], images: str, pixels: Sequence[Tensor]) -> None:
        small = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        shape = (sum(map(len, pixels)), *pixels[0].shape[1:])
        total = sum(map(_room, small.values())) + sum(tensor.nbytes for tensor in pixels)
        # As torch's own collating does; share_memory_() would copy memory that nothing has been written to yet.
        storage = torch.UntypedStorage._new_shared(max(total, _ALIGNMENT))
        self._memory: UInt8[Tensor, " bytes"] = torch.empty(0, dtype=torch.uint8).set_(storage)
        start = 0
        super().__init__(batch)
        for key, value in small.items():
            self[key] = _view(self._memory, value.dtype, value.shape, start).copy_(value)
            start += _room(value)
        self[images] = _view(self._memory, pixels[0].dtype, shape, start)
        if get_sharing_strategy() == "file_descriptor":
            _write(storage, pixels, start)
        else:
            torch.cat(list(pixels), out=self[images])

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[Any, ...]]:
        address = self._memory.data_ptr()
        inside = {
            key: (value.dtype, value.shape, value.data_ptr() - address)
            for key, value in self.items()
            if isinstance(value, Tensor)
            and value.untyped_storage().data_ptr() == address
            and value.is_contiguous()
            and value.numel()  # an empty tensor has no address
        }
        return _arrive, (self._memory, inside, {key: None if key in inside else self[key] for key in self})


_ALIGNMENT = 64  # bytes; each tensor starts at a multiple, as torch's own do


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _view(memory: Tensor, dtype: torch.dtype, shape: Sequence[int], start: int) -> Tensor:
    """A tensor inside a piece of memory, `start` bytes from its beginning."""
    strides = torch.empty(tuple(shape), device="meta").stride()
    storage = memory.untyped_storage()
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


def _arrive(memory: Tensor, inside: Mapping[str, Any], batch: Batch) -> Batch:
    """The plain dict again."""
    return batch | {key: _view(memory, *place) for key, place in inside.items()}
