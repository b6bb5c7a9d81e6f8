"""The names that the YAML uses for classes: Composer's own and ours, as `snake_name -> class`."""

from __future__ import annotations

import inspect
import re
from functools import cache
from importlib import import_module
from typing import Any

from composer.core import Algorithm, Callback
from composer.loggers import LoggerDestination
from composer.optim.scheduler import ComposerScheduler

from composer_path.own_parts.registry import own_classes

# Composer's words that no rule splits well; and "annealing", which every schedule does.
_SPELLINGS = {"Annealing": ""} | {
    word: word.capitalize() for word in ("NaN", "MLPerf", "WandB", "MLFlow", "CometML", "MosaicML")
}
# Section -> what its classes are, the last word of their names, and where they lie.
_SECTIONS = {
    "scheduler": (ComposerScheduler, "_scheduler", ["composer.optim"]),
    "algorithms": (Algorithm, "", ["composer.algorithms", "composer_path.algorithms"]),
    "callbacks": (Callback, "_callback", ["composer.callbacks", "composer_path.callbacks"]),
    "loggers": (LoggerDestination, "_logger", ["composer.loggers", "composer_path.callbacks.tensorboard"]),
}


def named_classes(section: str) -> dict[str, type]:
    """Classes that a section of the YAML may name: the libraries', and those of one's own."""
    own: Any = "schedulers" if section == "scheduler" else section
    return library_classes(section) | own_classes(own)


@cache
def library_classes(section: str) -> dict[str, type]:
    """Those of Composer and this project; one of ours goes before Composer's of the same name."""
    base, suffix, packages = _SECTIONS[section]
    others = () if section == "loggers" else LoggerDestination  # to Composer a callback; it has a section of its own
    return {
        snake_name(name).removesuffix(suffix): member
        for package in packages
        for name, member in vars(import_module(package)).items()
        if inspect.isclass(member)
        and issubclass(member, base)
        and member is not base
        and not issubclass(member, others)
    }


def snake_name(class_name: str) -> str:
    """`SpeedMonitor` -> `speed_monitor`, `OOMObserver` -> `oom_observer`."""
    for word, spelling in _SPELLINGS.items():
        class_name = class_name.replace(word, spelling)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", class_name).lower()
