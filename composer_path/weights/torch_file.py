"""A file of `torch.save`: tensors and plain values, read without unpickling it.

The pickle in it goes through `PickleReader`, the tensors are views of the (mapped) file, and each is checked to lie
inside the record that it claims. Sparse, quantized, nested and meta tensors and subclasses are refused.
"""

from __future__ import annotations

import datetime
import math
import mmap
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from composer_path.weights.pickle_values import Maker, PickleError, PickleReader, check_nesting
from composer_path.weights.torch_zip import TorchZip, ZipError


class TorchFileError(ValueError):
    """A file that isn't one of `torch.save`, is damaged, or holds other things.

    The message says what was found, `fix` what to do, if known.
    """

    def __init__(self, found: str, fix: str | None = None) -> None:
        super().__init__(found)
        self.fix = fix


class Storage:
    """Memory of tensors, with the type that the pickle gave it."""

    def __init__(self, memory: torch.UntypedStorage, dtype: torch.dtype, num_elements: int) -> None:
        self.memory, self.dtype, self.num_elements = memory, dtype, num_elements


class StorageType:
    """What the name of a storage class stands for."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def read_torch_file(path: str | Path, *, values: bool = False) -> Any:
    """What is in a file of `torch.save`; tensors are views of the mapped file, copied where they are written.

    Args:
        path: The file.
        values: Whether what checkpoints hold beside tensors (times, arrays of numpy, versions) may be in it.

    Raises:
        TorchFileError: It isn't such a file, is damaged, or holds other things.
    """
    with open(path, "rb") as file:
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except ValueError:
            raise TorchFileError("an empty file") from None
    return read_torch_buffer(mapped, values=values)


def read_torch_buffer(buffer: Any, *, values: bool = False) -> Any:
    """What is in a file of `torch.save` that lies in a writable buffer; see `read_torch_file`."""
    try:
        zip_file = TorchZip(buffer)
        names = CHECKPOINT_NAMES if values else TENSOR_NAMES
        stored = _Storages(zip_file).get
        value = PickleReader(bytes(zip_file.read("data.pkl")), names, STATES, stored).read()
        check_nesting(value)
    except (PickleError, ZipError) as error:
        raise TorchFileError(str(error), getattr(error, "fix", None)) from None
    return value


class _Storages:
    """The storages of one file by their keys; tied tensors share one."""

    def __init__(self, zip_file: TorchZip) -> None:
        self.zip = zip_file
        self.known: dict[str, torch.UntypedStorage] = {}

    def get(self, reference: Any) -> Storage:
        """The storage of a persistent id: ("storage", type, key, location, number of elements)."""
        if type(reference) is not tuple or len(reference) != 5 or reference[0] != "storage":
            raise PickleError("a persistent id that isn't a storage")
        _, kind, key, _, num_elements = reference
        if type(kind) is not StorageType or [type(part) for part in reference[2:]] != [str, str, int]:
            raise PickleError("a persistent id that isn't a storage")
        if key not in self.known:
            self.known[key] = self._memory(f"data/{key}")
        memory = self.known[key]
        if num_elements != memory.nbytes() // kind.dtype.itemsize:
            raise PickleError(
                f"a storage of {num_elements} elements of {kind.dtype} over a record of {memory.nbytes()} bytes"
            )
        return Storage(memory, kind.dtype, num_elements)

    def _memory(self, name: str) -> torch.UntypedStorage:
        try:
            length = self.zip.read(name).nbytes
        except ZipError as error:
            raise PickleError(str(error)) from None
        if not length:
            return torch.UntypedStorage(0)
        start = self.zip.records[name].start
        tensor = torch.frombuffer(self.zip.buffer, dtype=torch.uint8, count=length, offset=start)
        return (tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()).untyped_storage()


# --- what the names in the pickle stand for --------------------------------------------------------------------------


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise PickleError(what)


def _sizes(numbers: Any) -> tuple[int, ...]:
    _need(isinstance(numbers, (tuple, list)) and all(type(n) is int and n >= 0 for n in numbers), "sizes below 0")
    return tuple(numbers)


def _tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
    dtype: Any = None,
) -> Tensor:
    """A view of a storage that lies inside of it, and isn't larger than it."""
    _need(type(storage) is Storage, "a tensor without a storage")
    dtype = storage.dtype if dtype is None else dtype
    _need(type(dtype) is torch.dtype and type(requires_grad) is bool, "a tensor without a type")
    _need(not hooks and not metadata, "a tensor with hooks, or conjugated")
    (offset,), size, stride = _sizes((offset,)), _sizes(size), _sizes(stride)
    num_elements = storage.memory.nbytes() // dtype.itemsize
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if all(size) else offset
    if last + bool(math.prod(size)) > num_elements or math.prod(size) > num_elements:
        raise PickleError(f"a tensor of {list(size)} elements from {offset} on, beyond its {num_elements} stored ones")
    tensor = torch.empty(0, dtype=dtype).set_(storage.memory, offset, size, stride)
    return tensor.requires_grad_(requires_grad)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> Tensor:
    _need(type(dtype) is torch.dtype, "a tensor without a type")
    return _tensor(storage, offset, size, stride, grad, hooks, metadata, dtype)


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> torch.nn.Parameter:
    _need(type(data) is Tensor and type(requires_grad) is bool and not hooks, "a parameter without a tensor")
    return torch.nn.Parameter(data.detach(), requires_grad)


def _ordered(*arguments: Any) -> OrderedDict[Any, Any]:
    _need(not arguments, "an OrderedDict with arguments")
    return OrderedDict()


def _ordered_state(value: OrderedDict[Any, Any], state: Any) -> None:
    """Modules keep the versions of their layers beside their state dict."""
    _need(type(state) is dict and set(state) <= {"_metadata"}, "an OrderedDict with further attributes")
    for key, versions in state.items():
        _need(type(versions) in (dict, OrderedDict), "an OrderedDict with further attributes")
        setattr(value, key, versions)


def _encoded(text: Any, encoding: Any) -> bytes:
    _need(type(text) is str and encoding == "latin1", "bytes in another encoding")
    return text.encode("latin1")


def _set(items: Any) -> set[Any]:
    _need(type(items) is list and all(type(item) in (str, int, float, bool, bytes) for item in items), "such a set")
    return set(items)


def _array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    _need(kind is ARRAY and shape == (0,) and code == b"b", "an array that isn't numpy's own")
    return np.empty(0, dtype=np.int8)


def _array_state(array: np.ndarray, state: Any) -> None:
    _need(type(state) is tuple and len(state) == 5, "an array without a state")
    version, shape, dtype, by_columns, data = state
    shape = _sizes(shape)
    _need(type(dtype) in NUMBER_TYPES and type(data) is bytes and version == 1, "an array of other than numbers")
    _need(math.prod(shape) * dtype.itemsize == len(data), "an array that is longer or shorter than its bytes")
    array.__setstate__((1, shape, dtype, bool(by_columns), data))  # type: ignore[arg-type]


def _number_type(code: Any, align: Any = False, copy: Any = True) -> np.dtype:
    _need(type(code) is str and code in NUMBERS, "an array of other than numbers")
    return np.dtype(code)


def _number_type_state(dtype: np.dtype, state: Any) -> None:
    _need(type(state) is tuple and len(state) == 8, "a type of numbers with fields")
    plain = state[1] in ("<", "|", "=") and state[2:] == (None, None, None, -1, -1, 0)
    _need(state[0] == 3 and plain, "a type of numbers with fields, or another byte order")


def _number(dtype: Any, data: Any) -> Any:
    _need(type(dtype) in NUMBER_TYPES and type(data) is bytes and len(data) == dtype.itemsize, "such a number")
    return np.frombuffer(data, dtype)[0]


def _of(kind: Callable[..., Any], *types: type) -> Maker:
    """Makes a value of Python's or torch's own from arguments of exactly these types."""

    def make(*arguments: Any) -> Any:
        _need([type(argument) for argument in arguments] == list(types), f"such a {kind.__name__}")
        return kind(*arguments)

    return Maker(make)


ARRAY = object()  # what `numpy.ndarray` stands for; it is only asked for by name
NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
NUMBER_TYPES = {type(np.dtype(code)) for code in NUMBERS}
DTYPES = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "bfloat16"]
DTYPES += ["float32", "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"]
DTYPE_NAMES: dict[str, Any] = {f"torch.{name}": getattr(torch, name) for name in DTYPES}
STORAGES = {"Bool": torch.bool, "Byte": torch.uint8, "Char": torch.int8, "Short": torch.int16, "Int": torch.int32}
STORAGES |= {"Long": torch.int64, "Half": torch.float16, "BFloat16": torch.bfloat16, "Float": torch.float32}
STORAGES |= {"Double": torch.float64, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128}
# What files of tensors name.
TENSOR_NAMES: Mapping[str, Any] = {
    **DTYPE_NAMES,
    **{f"torch.{name}Storage": StorageType(dtype) for name, dtype in STORAGES.items()},
    "torch.storage.UntypedStorage": StorageType(torch.uint8),
    "torch._utils._rebuild_tensor": Maker(_tensor),
    "torch._utils._rebuild_tensor_v2": Maker(_tensor),
    "torch._utils._rebuild_tensor_v3": Maker(_tensor_v3),
    "torch._utils._rebuild_parameter": Maker(_parameter),
    "torch.Size": Maker(lambda sizes: torch.Size(_sizes(sizes))),
    "collections.OrderedDict": Maker(_ordered),
    "_codecs.encode": Maker(_encoded),
    "__builtin__.set": Maker(_set),
    "builtins.set": Maker(_set),
}
# What checkpoints of Composer name too.
CHECKPOINT_NAMES: Mapping[str, Any] = {
    **TENSOR_NAMES,
    "datetime.timedelta": _of(datetime.timedelta, int, int, int),
    "datetime.datetime": _of(datetime.datetime, bytes),
    "torch.torch_version.TorchVersion": _of(TorchVersion, str),
    "numpy.ndarray": ARRAY,
    "numpy.dtype": Maker(_number_type),
    "numpy.core.multiarray._reconstruct": Maker(_array),
    "numpy._core.multiarray._reconstruct": Maker(_array),
    "numpy.core.multiarray.scalar": Maker(_number),
    "numpy._core.multiarray.scalar": Maker(_number),
}
STATES: Mapping[type, Callable[[Any, Any], None]] = {
    OrderedDict: _ordered_state,
    np.ndarray: _array_state,
    **dict.fromkeys(NUMBER_TYPES, _number_type_state),
}
