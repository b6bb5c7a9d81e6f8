"""Foreign weights: one key table and a pair of functions for each format, outside the models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from composer_path.weights.reference import load_reference_model, save_reference_model

__all__ = ["load_reference_model", "save_reference_model"]


def __getattr__(name: str) -> Any:
    # On first use: reference.py builds whole models, and the models' own files import this package.
    if name in __all__:
        from composer_path.weights import reference

        return getattr(reference, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
