"""Rules for single values of a YAML that a type can't say: times, sizes, names, addresses. Each raises ValueError."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

# What ends or comes round: iterations don't, as nothing here says how long one is.
_UNITS = ("ep", "ba", "sp", "tok", "dur", "sec")


def check_max_duration(value: str | int) -> None:
    """How long a run is: Composer takes no clock time, and a share would be of itself."""
    _check_time(value, _UNITS[:4], zero=False)


def check_interval(value: str | int) -> None:
    """How often something happens."""
    _check_time(value, _UNITS, zero=False)


def check_eval_interval(value: str | int) -> None:
    """The same; Composer's word for never is 0."""
    if value != 0:
        check_interval(value)


def check_console_interval(value: str | int) -> None:
    """The same; Composer's console counts epochs and batches only."""
    _check_time(value, _UNITS[:2], zero=False)


def check_moment(value: str | int) -> None:
    """When something happens, or how long it lasts, within a run."""
    _check_time(value, _UNITS[:5], zero=True)


def _check_time(value: str | int, units: tuple[str, ...], zero: bool) -> None:
    from composer.core import Time

    if isinstance(value, bool | float):
        return  # no time: another rule's
    try:
        time = Time.from_input(value, "ep")
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"found {value}, which is no time; {_AS_TIME}") from None
    if time.unit.value not in units:
        raise ValueError(f"found {value}; its unit must be one of {', '.join(units)}")
    if not (0 < time.value < math.inf or (zero and time.value == 0)):
        raise ValueError(f"found {value}; it must be {'at least' if zero else 'above'} 0")


_AS_TIME = "write a whole number and a unit, as in 1ep, 500ba, or a share of the run, as in 0.03dur"


def check_above_zero(value: float | int) -> None:
    """A number that may not be 0."""
    if value <= 0:
        raise ValueError(f"found {value}; it must be above 0")


def check_beta(value: float | int) -> None:
    """How much of a moment AdamW keeps."""
    if not 0 <= value < 1:
        raise ValueError(f"found {value}; it must be at least 0 and below 1")


def check_bytes(value: str | int) -> None:
    """A size in bytes, in Streaming's words."""
    from streaming.base.util import bytes_to_int

    if _count(bytes_to_int, value) < 2**20:
        raise ValueError(
            f"found {value}, which is no size or too small for any shard; give number and unit, as in 10gb"
        )


def check_epoch_size(value: str | int) -> None:
    """A number of samples, in Streaming's words."""
    from streaming.base.util import number_abbrev_to_int

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
        raise ValueError(
            f"found '{name}', which isn't a folder below save_root; give a name without '..' or a first '/'"
        )


def check_address(url: str) -> None:
    """Where shards are fetched from."""
    from composer_path.storage.places import check_readable

    check_readable(url)


def check_place(place: str) -> None:
    """A folder, or an address in its place."""
    if "://" in place:
        check_address(place)


def check_template(template: str | dict[str, Any] | None) -> None:
    """A prompt template: checked by itself."""
    from composer_path.records.prompts import get_template

    if template is not None:
        get_template(template)


def check_vision_name(name: str) -> None:
    """A vision encoder that there is."""
    import difflib

    import timm

    from composer_path.models.open_clip_trunk import open_clip_vision_config

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
    from composer_path.models.projector import REFERENCE_TYPE

    if not REFERENCE_TYPE.fullmatch(name):
        raise ValueError(
            f"found '{name}'; it must be attn_pool+mlp2x_gelu, attn_pool+linear, linear, mlpNx_gelu or identity"
        )


def check_language_model(config: dict[str, Any] | str) -> None:
    """A configuration that transformers knows, without keys that it doesn't, and one that our attention can serve."""
    import difflib
    import inspect

    from transformers import CONFIG_MAPPING

    from composer_path.models.language_model import load_language_model_config

    if isinstance(config, Mapping) and config.get("model_type") in CONFIG_MAPPING:
        cls = CONFIG_MAPPING[config["model_type"]]
        known = set(cls().to_dict()) | set(inspect.signature(cls.__init__).parameters)
        for key in config:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise ValueError(f"unknown key '{key}' for model_type {config['model_type']}{hint}")
    load_language_model_config(dict(config) if isinstance(config, Mapping) else config)
