"""The names that the YAML uses for classes: Composer's own and ours, as `snake_name -> class`."""

from __future__ import annotations

import importlib
import inspect
import re
from functools import cache

# Composer's words that no rule splits well; and "annealing", which every schedule does.
_SPELLINGS = {
    "Annealing": "",
    "NaN": "Nan",
    "MLPerf": "Mlperf",
    "WandB": "Wandb",
    "MLFlow": "Mlflow",
    "CometML": "Cometml",
    "MosaicML": "Mosaicml",
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
    base_module, base_name, suffix = _COMPOSER_BASES[section]
    base = getattr(importlib.import_module(base_module), base_name)
    classes = _classes_of("composer.optim" if section == "scheduler" else f"composer.{section}", base, suffix)
    if section in ("algorithms", "callbacks"):
        classes |= _classes_of(f"composer_path.{section}", base, suffix)
    return classes


def snake_name(class_name: str) -> str:
    """`SpeedMonitor` -> `speed_monitor`, `OOMObserver` -> `oom_observer`."""
    for word, spelling in _SPELLINGS.items():
        class_name = class_name.replace(word, spelling)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", class_name).lower()


def _classes_of(package: str, base: type, suffix: str) -> dict[str, type]:
    from composer.loggers import LoggerDestination

    members = vars(importlib.import_module(package))
    return {
        snake_name(name).removesuffix(suffix): member
        for name, member in members.items()
        if inspect.isclass(member)
        and issubclass(member, base)
        and member is not base
        # Loggers are callbacks to Composer, but have a section of their own.
        and (issubclass(base, LoggerDestination) or not issubclass(member, LoggerDestination))
    }
