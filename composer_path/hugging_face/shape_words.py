"""The words for tensors' shapes where jaxtyping isn't installed: `Float[Tensor, "batch dim"]` reads as `Tensor`."""

from __future__ import annotations

from typing import Any


class _Shaped:
    """A kind of numbers; of what kind and shape is for those who read."""

    def __class_getitem__(cls, words: tuple[Any, str]) -> Any:
        return words[0]


Bool = Float = Float32 = Int = Int32 = Int64 = UInt8 = _Shaped
