"""The model that is handed on: of a run, of one of its checkpoints, or of a folder that an export wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from composer_path.asking.assistant import Assistant
from composer_path.models.lora import merged
from composer_path.run.export import DTYPES, Trained, read_trained


def of_checkpoint(checkpoint: Path, config: Any) -> Trained:
    """The model of a checkpoint, adapters apart."""
    return read_trained(checkpoint, config)


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
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype of written weights: unknown '{dtype}'; choose one of {', '.join(DTYPES)}")
    weights = merged(found.model, found.weights)
    if tied := found.model.tied_names():
        weights.pop(tied[0], None)
    return weights if dtype is None else cast(weights, DTYPES[dtype])


def cast(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights in another dtype; whole numbers stay."""
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in weights.items()}


def merged_model(found: Trained, dtype: str | None = None) -> Trained:
    """The same with its adapters merged; what it learned isn't among its modules' own weights."""
    return replace(found, weights=whole_weights(found, dtype))
