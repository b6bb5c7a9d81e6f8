"""The names that the YAML uses for classes: Composer's own and ours, as `snake_name -> class`."""

from __future__ import annotations

import inspect
import re
from functools import cache
from importlib import import_module

# Composer's words that no rule splits well; and "annealing", which every schedule does.
_SPELLINGS = {"Annealing": ""} | {
    word: word.capitalize() for word in ("NaN", "MLPerf", "WandB", "MLFlow", "CometML", "MosaicML")
}
_COMPOSER_BASES = {
    "scheduler": ("composer.optim.scheduler", "ComposerScheduler", "_scheduler"),
    "algorithms": ("composer.core", "Algorithm", ""),
    "callbacks": ("composer.core", "Callback", "_callback"),
    "loggers": ("composer.loggers", "LoggerDestination", "_logger"),
}


@cache
def named_classes(section: str) -> dict[str, type]:
    """Classes that a section of the YAML may name; one of ours goes before Composer's of the same name.

    Args:
        section: `scheduler`, `algorithms`, `callbacks` or `loggers`.
    """
    module, name, suffix = _COMPOSER_BASES[section]
    base = getattr(import_module(module), name)
    # Loggers are callbacks to Composer, but have a section of their own.
    others = () if section == "loggers" else import_module("composer.loggers").LoggerDestination
    packages = ["composer.optim" if section == "scheduler" else f"composer.{section}"]
    packages += [f"composer_path.{section}"] if section in ("algorithms", "callbacks") else []
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
