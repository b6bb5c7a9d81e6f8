"""Flags of a turn that say how much its answer is to be learned: `loss`, `weight`, `train`, `loss_mask`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

FLAGS = ("loss", "weight", "train", "loss_mask")


def is_weight(value: object) -> bool:
    """Whether a flag's value is true, false, or a number from 0 to 1."""
    return isinstance(value, bool | int | float) and math.isfinite(value) and 0 <= value <= 1


def weights_said(turn: Mapping[str, Any]) -> set[float]:
    """What a turn's flags say, each of which must be a weight; more than one entry is a contradiction."""
    return {float(turn[flag]) for flag in FLAGS if turn.get(flag) is not None}


def weight_of(turn: Mapping[str, Any]) -> float:
    """Return the weight of a checked turn; one that says nothing weighs 1."""
    return min(weights_said(turn), default=1.0)
