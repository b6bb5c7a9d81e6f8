"""Parameters of a model under construction: their dtype, and models that are built without storage for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_REGISTER = nn.Module.register_parameter


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> Any:
    """Cast the parameters only: `module.to(bfloat16)` would cast RoPE's `inv_freq` too, 5 rad off at position 4,095."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


@contextmanager
def empty_parameters(enabled: bool = True) -> Iterator[None]:
    """Within this context, modules are built with parameters on the meta device and real buffers."""
    if not enabled:
        yield
        return
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        _empty(module, name)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def built_emptied(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes, also of a class that computes with its parameters while it is built.

    Where they are empty such a class fails; it is built with real ones then, which are emptied afterwards.
    """
    register = nn.Module.register_parameter
    try:
        return build()
    except (NotImplementedError, RuntimeError):  # torch's, of tensors without storage
        if register is _REGISTER:
            raise
    nn.Module.register_parameter = _REGISTER  # type: ignore[method-assign]
    try:
        whole = build()
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
    for module in whole.modules():
        for name in module._parameters:
            _empty(module, name)
    return whole


def _empty(module: nn.Module, name: str) -> None:
    """Take a parameter's storage away; one that is empty already may be tied, and stays the same object."""
    param = module._parameters[name]
    if param is not None and not param.is_meta:
        module._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
