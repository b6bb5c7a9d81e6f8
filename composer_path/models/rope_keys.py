"""RoPE in a model's configuration: transformers 5 writes it in words that transformers 4 passes over in silence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import PretrainedConfig

TRANSFORMERS_MAJOR = int(transformers.__version__.split(".")[0])


def old_rope_keys(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Transformers 4's `rope_theta`, `rope_scaling` and `partial_rotary_factor`, which transformers 5 reads as well.

    `parameters` are transformers 5's `rope_parameters`; empty where a configuration is in the old words already.
    """
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise ValueError(
            f"language model: its rope_parameters differ between layers ({', '.join(parameters)}), which "
            "transformers 4 can't express; install transformers 5 or choose another model"
        )
    scaling = dict(parameters)
    if not scaling:
        return {}
    keys = {key: scaling.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in scaling}
    return keys | {"rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling}


def read_rope_parameters(config: PretrainedConfig) -> None:
    """Let transformers 4 follow a configuration that transformers 5 wrote; without this, theta is always 10,000."""
    parameters = getattr(config, "rope_parameters", None)
    if TRANSFORMERS_MAJOR >= 5 or not parameters:
        return
    config.update(old_rope_keys(parameters))
    del config.rope_parameters
