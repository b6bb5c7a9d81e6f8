"""What makes a class a part of a kind: its base class, what it must have, and the names that are taken."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from composer.core import Algorithm, Callback
from composer.loggers import LoggerDestination
from composer.optim.scheduler import ComposerScheduler
from torch.optim import Optimizer
from torchmetrics import Metric

from composer_path.layouts.own import RecordLayout
from composer_path.layouts.registry import LAYOUT_NAMES, SET_NAMES
from composer_path.models.projector import REFERENCE_TYPE, Projector
from composer_path.models.trunk import VisionTrunk
from composer_path.own_parts.registry import Kind
from composer_path.records.prompts import TEMPLATES, PromptTemplate
from composer_path.run.names import library_classes, snake_name
from composer_path.run.optimizer import known_optimizers

__all__ = ["base_of", "lacks", "snake_name", "taken_names"]

# In this order: a logger is a callback, too.
_BASES: dict[Kind, type] = {
    "loggers": LoggerDestination,
    "callbacks": Callback,
    "algorithms": Algorithm,
    "optimizers": Optimizer,
    "schedulers": ComposerScheduler,
    "projectors": Projector,
    "vision_encoders": VisionTrunk,
    "templates": PromptTemplate,
    "layouts": RecordLayout,
    "metrics": Metric,
}
# What a class of a kind must define itself, beside what is abstract in its base.
_DEFINED: dict[Kind, str] = {
    "schedulers": "__call__",
    "projectors": "project",
    "vision_encoders": "forward_features",
    "layouts": "read",
    "metrics": "update",
}


def base_of(cls: type) -> Kind | None:
    """The kind that a class is of."""
    return next((kind for kind, base in _BASES.items() if issubclass(cls, base) and cls is not base), None)


def lacks(kind: Kind, cls: type) -> str | None:
    """What keeps a class from being used, in words; None where nothing does."""
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    name = _DEFINED.get(kind)
    if name is not None and getattr(cls, name) is getattr(_BASES[kind], name, None):
        missing.append(name)
    if missing:
        return f"lacks {' and '.join(missing)}; define what every one of its kind has, or begin its name with _"
    for p in inspect.signature(cls.__init__).parameters.values():  # type: ignore[misc]
        if p.kind is p.POSITIONAL_ONLY and p.name != "self" and p.default is p.empty:
            return f"takes {p.name} by its position only; a YAML gives keywords"
    return None


@cache
def taken_names(kind: Kind) -> frozenset[str]:
    """The names of this project's and of Composer's."""
    if kind in ("algorithms", "callbacks", "loggers"):
        return frozenset(library_classes(kind))
    names: dict[str, Any] = {
        "schedulers": library_classes("scheduler"),
        "optimizers": known_optimizers(),
        "templates": TEMPLATES,
        "vision_encoders": ["coca_vit-l", "timm", "open_clip"],
        "projectors": [name for name in ("linear", "identity") if REFERENCE_TYPE.fullmatch(name)],
        "metrics": ["token_loss"],
        "layouts": (*LAYOUT_NAMES, *SET_NAMES),
    }
    return frozenset(names.get(kind, ()))
