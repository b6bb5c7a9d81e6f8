"""What a run measures: its held-out set, and others by names of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HELD_OUT = "heldout"  # what `eval_loader` is called in metrics
OTHERS = "eval_loaders"


def eval_sections(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The loaders of evaluations by what they are called in metrics."""
    found = {HELD_OUT: settings["eval_loader"], **settings[OTHERS]}
    return {label: section for label, section in found.items() if section is not None}


def loader_sections(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All loaders of a configuration, by their paths."""
    found = {name: settings.get(name) for name in ("train_loader", "eval_loader")}
    others = settings.get(OTHERS)
    found |= {f"{OTHERS}.{name}": one for name, one in (others if isinstance(others, Mapping) else {}).items()}
    return {name: section for name, section in found.items() if section is not None}
