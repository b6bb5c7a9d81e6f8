"""Rules for single values of a YAML that a type can't say: times, sizes, names, addresses. Each raises ValueError."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import timm
from composer.core import Time
from streaming.base.util import bytes_to_int, number_abbrev_to_int
from transformers import CONFIG_MAPPING

from composer_path.config.types import nearest
from composer_path.models.language_model import load_language_model_config
from composer_path.models.open_clip_trunk import open_clip_vision_config
from composer_path.models.projector import REFERENCE_TYPE


def is_time(text: Any) -> bool:
    """Whether it is text that Composer reads as a time."""
    try:
        return isinstance(text, str) and text != "" and Time.from_timestring(text) is not None
    except ValueError:
        return False


def check_time(value: str | int | float, units: tuple[str, ...], zero: bool = False) -> None:
    """A time in Composer's words; a bare number counts epochs.

    Args:
        value: What is checked.
        units: What it may be counted in.
        zero: Whether it may be 0.
    """
    if isinstance(value, float):
        return  # a share, where an algorithm also takes a number
    try:
        time = Time.from_input(value, "ep")
    except (ValueError, TypeError, OverflowError):
        fix = "write a whole number and a unit, as in 1ep, 500ba, or a share of the run, as in 0.03dur"
        raise ValueError(f"found {value}, which is no time; {fix}") from None
    if time.unit.value not in units:
        raise ValueError(f"found {value}; its unit must be one of {', '.join(units)}")
    if not (0 < time.value < math.inf or (zero and time.value == 0)):
        raise ValueError(f"found {value}; it must be {'at least' if zero else 'above'} 0")


# Iterations never end here, as nothing says how long one is; Composer's runs and schedulers know no clock.
check_max_duration = partial(check_time, units=("ep", "ba", "sp", "tok"))
check_moment = partial(check_time, units=("ep", "ba", "sp", "tok", "dur"), zero=True)
check_interval = partial(check_time, units=("ep", "ba", "sp", "tok", "dur", "sec"))
check_eval_interval = partial(check_interval, zero=True)  # 0 is Composer's word for never
check_console_interval = partial(check_time, units=("ep", "ba"))


def check_above_zero(value: int | float) -> None:
    """A number that may not be 0."""
    if value <= 0:
        raise ValueError(f"found {value}; it must be above 0")


def check_beta(value: int | float) -> None:
    """How much of a moment AdamW keeps."""
    if not 0 <= value < 1:
        raise ValueError(f"found {value}; it must be at least 0 and below 1")


def check_bytes(value: str | int) -> None:
    """A size in bytes, in Streaming's words."""
    if _count(bytes_to_int, value) < 2**20:
        raise ValueError(f"found {value}, which is no size or too small; give a number and a unit, as in 10gb")


def check_epoch_size(value: str | int) -> None:
    """A number of samples, in Streaming's words."""
    if _count(number_abbrev_to_int, value) < 1:
        raise ValueError(f"found {value}; it must be a number of samples, as in 50000 or 50k")


def _count(read: Callable[[str | int], int], value: str | int) -> int:
    try:
        return read(value)
    except (ValueError, OverflowError):
        return 0


def check_run_name(name: str) -> None:
    """The name of a folder below save_root."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"found '{name}', which is no folder below save_root; give a name without '..' or a first '/'")


def check_vision_name(name: str) -> None:
    """A vision encoder that there is."""
    family, _, model = name.partition("/")
    if family == "timm" and not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models("*vit*"), n=2)
        raise ValueError(f"timm has no model '{model}'" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    if family == "open_clip":
        open_clip_vision_config(model)
    if name != "coca_vit-l" and (not model or family not in ("timm", "open_clip")):
        raise ValueError(f"found '{name}'; it must be coca_vit-l, timm/<a timm ViT> or open_clip/<an open_clip model>")


def check_projector_type(name: str) -> None:
    """One of the reference's names."""
    if not REFERENCE_TYPE.fullmatch(name):
        rule = "it must be attn_pool+mlp2x_gelu, attn_pool+linear, linear, mlpNx_gelu or identity"
        raise ValueError(f"found '{name}'; {rule}")


def check_language_model(config: dict[str, Any] | str) -> None:
    """A configuration that transformers knows, without keys that it doesn't, and one that our attention can serve."""
    if isinstance(config, Mapping) and config.get("model_type") in CONFIG_MAPPING:
        cls = CONFIG_MAPPING[config["model_type"]]
        known = set(cls().to_dict()) | set(inspect.signature(cls.__init__).parameters)
        for key in config:
            if key not in known:
                hint = f"; did you mean '{near}'?" if (near := nearest(key, known)) else ""
                raise ValueError(f"unknown key '{key}' for model_type {config['model_type']}{hint}")
    load_language_model_config(dict(config) if isinstance(config, Mapping) else config)
