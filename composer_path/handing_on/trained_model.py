"""The model that is handed on: of a folder that an export wrote, or as a run has it (`run/export.py`)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from composer_path.asking.assistant import Assistant
from composer_path.models.lora import merged
from composer_path.run.export import Trained, cast


def of_folder(folder: Path) -> Trained:
    """The model of an exported folder, whose adapters were merged when it was written."""
    assistant = Assistant.from_pretrained(folder, device="cpu")
    weights = dict(assistant.model.state_dict())
    return Trained(assistant.model, weights, assistant.tokenizer, assistant.text, assistant.images)


def whole_weights(found: Trained, dtype: str | None) -> dict[str, Tensor]:
    """All weights, adapters merged, tied ones once, in the dtype that is asked for.

    Raises:
        ValueError: An unknown dtype.
    """
    weights = merged(found.model, found.weights)
    if tied := found.model.tied_names():
        weights.pop(tied[0], None)
    cast(weights, dtype)
    return weights
