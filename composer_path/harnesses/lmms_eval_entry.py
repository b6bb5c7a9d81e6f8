"""What lmms-eval's entry point `lmms_eval.models` gives it: the name of our model and where its classes are."""

from __future__ import annotations

from typing import Any

MODEL_ID = "composer_path"
_ROOM = "composer_path.harnesses.lmms_eval_model"


def manifest() -> Any:
    """The model `composer_path`, for tasks of messages and (with `--force_simple`) for those of likelihoods."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        MODEL_ID, simple_class_path=f"{_ROOM}.SimpleComposerPath", chat_class_path=f"{_ROOM}.ComposerPath"
    )
