"""Rules for single values of a YAML that a type can't say: times, sizes, names, addresses. Each raises ValueError."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from composer.core import Time
from streaming.base.util import bytes_to_int, number_abbrev_to_int
from transformers import CONFIG_MAPPING

from composer_path.config.types import hint, nearest
from composer_path.models.language_model import load_language_model_config
from composer_path.models.pattern import check_pattern
from composer_path.models.projector import REFERENCE_TYPE
from composer_path.own_parts.registry import own_classes
from composer_path.run.optimizer import OwnRate
from composer_path.storage.places import is_remote


def check_time(value: str | int | float, units: tuple[str, ...], zero: bool = False) -> None:
    """A time in Composer's words, in one of some units; a bare number counts epochs."""
    if isinstance(value, float):
        return  # a share, where an algorithm also takes a number
    try:
        time = Time.from_input(value, "ep")
    except (ValueError, TypeError, OverflowError):
        fix = "write a whole number and a unit, as in 1ep, 500ba, or a share of the run, as in 0.03dur"
        raise ValueError(f"found {value}, which is no time; {fix}") from None
    if time.unit.value not in units:
        raise ValueError(f"found {value}; its unit must be one of {', '.join(units)}")
    if not (0 < time.value < 2**63 or (zero and time.value == 0)):
        if time.value > 0:
            raise ValueError(f"found {value}; it must be below 2**63")
        raise ValueError(f"found {value}; it must be {'at least' if zero else 'above'} 0")


# Iterations never end here, as nothing says how long one is; Composer's runs and schedulers know no clock.
check_max_duration = partial(check_time, units=("ep", "ba", "sp", "tok"))
check_moment = partial(check_time, units=("ep", "ba", "sp", "tok", "dur"), zero=True)
check_interval = partial(check_time, units=("ep", "ba", "sp", "tok", "dur", "sec"))
check_eval_interval = partial(check_interval, zero=True)  # 0 is Composer's word for never
check_console_interval = partial(check_time, units=("ep", "ba"))


def _rule(words: str, holds: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A check that says these words of a value for which something doesn't hold, or can't be asked."""

    def check(value: Any) -> None:
        with suppress(ValueError, OverflowError):
            if holds(value):
                return
        raise ValueError(words.format(value))

    return check


check_above_zero = _rule("found {}; it must be above 0", lambda number: number > 0)
check_shard_degree = _rule(
    "found {}; it must be a number of ranks, or -1 for all that there are", lambda ranks: ranks == -1 or ranks >= 1
)
check_seconds = _rule("found {}; it must be above 0 and at most 1e9 seconds", lambda seconds: 0 < seconds <= 1e9)
check_mean = _rule("found {}; it must be between 0 and 1, as pixels are", lambda mean: 0 <= mean <= 1)
check_std = _rule("found {}; it must be between 0.001 and 10: pixels are divided by it", lambda std: 0.001 <= std <= 10)
check_beta = _rule("found {}; it must be at least 0 and below 1", lambda number: 0 <= number < 1)
check_share = _rule("found {}; it must be above 0 and at most 1", lambda number: 0 < number <= 1)
check_bytes = _rule(
    "found {}, which is no size or too small; give a number and a unit, as in 10gb",
    lambda size: bytes_to_int(size) >= 2**20,
)
check_epoch_size = _rule(
    "found {}; it must be a number of samples, as in 50000 or 50k", lambda size: number_abbrev_to_int(size) >= 1
)
check_run_name = _rule(
    "found {!r}, which is no folder below save_root; give one of visible letters (200 a folder), without '..', "
    "braces or a first '/'",
    lambda name: (
        (parts := PurePosixPath(name).parts)
        and parts[0][0] != "/"
        and ".." not in parts
        and name.isprintable()
        and max(len(part.encode()) for part in parts) <= 200
        and not set(name) & set("{}")
    ),
)
check_save_root = _rule(
    "found '{}'; it must be a folder (~ isn't filled in, ${{oc.env:HOME}} is), s3://... or gs://...",
    lambda root: root and root[0] != "~" and (not is_remote(root) or root.partition("://")[0] in ("s3", "gs", "gcs")),
)
check_number_to_keep = _rule(
    "found {}; it must be at least 1, or -1 for all", lambda number: number >= 1 or number == -1
)


def check_warmup(value: str) -> None:
    """A moment, at most the run's end."""
    check_moment(value)
    if (time := Time.from_input(value, "ep")).unit.value == "dur" and time.value > 1:
        raise ValueError(f"found {value}; it must be at most 1dur, the whole run, and is usually 0.03dur")


def check_rates(lr: int | float | Mapping[str, Any]) -> None:
    """A learning rate, or several by module, that teach something."""
    for name, rate in lr.items() if isinstance(lr, Mapping) else [("", lr)]:
        if not isinstance(rate, bool) and isinstance(rate, int | float) and not rate > 0:
            where = f"{name}: " if name else ""
            raise ValueError(f"{where}found {rate}; it must be above 0; what shall not learn, leave out of trainable")


def check_projector_type(name: str) -> None:
    """A projector that there is."""
    own = own_classes("projectors")
    if name not in own and not REFERENCE_TYPE.fullmatch(name):
        words = "attn_pool+mlp2x_gelu, attn_pool+linear, linear, mlpNx_gelu or identity, or a class of one's own"
        near = nearest(name, own)
        raise ValueError(f"found '{name}'; " + (f"did you mean {near}?" if near else f"it must be {words} (imports)"))


def check_own_rate(group: dict[str, Any]) -> None:
    """One of the optimizer's groups: keywords of `OwnRate`, checked like those of a section."""
    known = [field.name for field in fields(OwnRate)]
    for key in group:
        if key not in known:
            fix = hint(key, known, f"there are {', '.join(known)}")
            raise ValueError(f"unknown key '{key}'; {fix}")
    match = group.get("match")
    if not isinstance(match, str):
        raise ValueError(f"match: found {match}; it must be text: a module, or a pattern of its weights")
    check_pattern(match)
    if not any(value is not None for key, value in group.items() if key != "match"):
        raise ValueError(f"found nothing for '{match}'; give lr, weight_decay or t_warmup")
    for key in ("lr", "weight_decay"):
        value = group.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0):
            raise ValueError(f"{key}: found {value}; it must be a number, at least 0")
    if (warmup := group.get("t_warmup")) is not None:
        if not isinstance(warmup, str):
            raise ValueError(f"t_warmup: found {warmup}; it must be text, a time such as 1ep or 500ba")
        check_moment(warmup)


def check_language_model(config: dict[str, Any] | str) -> None:
    """A configuration that transformers knows, without keys that it doesn't, and one that our attention can serve."""
    model_type = config.get("model_type") if isinstance(config, Mapping) else None
    if isinstance(config, Mapping) and isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        cls = CONFIG_MAPPING[config["model_type"]]
        known = set(cls().to_dict()) | set(inspect.signature(cls.__init__).parameters)
        for key in config:
            if key not in known:
                hint = f"; did you mean '{near}'?" if (near := nearest(key, known)) else ""
                raise ValueError(f"unknown key '{key}' for model_type {config['model_type']}{hint}")
    try:
        load_language_model_config(dict(config) if isinstance(config, Mapping) else config)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("model.language_model: ")) from None
