"""Vision encoder, projector, language model, and the two classes that put them together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from composer_path.models.composer_model import ComposerPathMLLM
    from composer_path.models.path_mllm import PathMLLM

__all__ = ["ComposerPathMLLM", "PathMLLM"]


def __getattr__(name: str) -> Any:
    # On first use: Composer takes seconds to import, and asking a model doesn't need it.
    if name == "ComposerPathMLLM":
        from composer_path.models.composer_model import ComposerPathMLLM

        return ComposerPathMLLM
    if name == "PathMLLM":
        from composer_path.models.path_mllm import PathMLLM

        return PathMLLM
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
