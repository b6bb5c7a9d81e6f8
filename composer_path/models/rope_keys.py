"""RoPE in a model's configuration: in the words of transformers 4 or 5, and whether it depends on how long a row is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import PretrainedConfig

TRANSFORMERS_MAJOR = int(transformers.__version__.split(".")[0])
ORIGINAL = "original_max_position_embeddings"


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


def check_rope_supported(config: PretrainedConfig, longest: int) -> None:
    """Refuse, by name, a RoPE that turns a sample of a row otherwise because of a longer one beside it.

    Transformers takes the frequencies of such kinds (`dynamic`, `longrope`) from the longest sample of a row. Up to the
    length that the model was first trained with they are the same for all.

    Args:
        config: Of the language model.
        longest: Tokens of the longest sample.

    Raises:
        ValueError: It does, at this length.
    """
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    of_layers = [value for value in parameters.values() if isinstance(value, Mapping)]
    for rope in of_layers or [parameters]:
        kind = str(rope.get("rope_type") or rope.get("type") or "default")
        if "dynamic" not in kind and kind != "longrope":
            continue
        known = [getattr(config, "max_position_embeddings", None)]
        if kind == "longrope":
            known += [getattr(config, ORIGINAL, None), rope.get(ORIGINAL)]
        limit = min((number for number in known if number is not None), default=0)
        if longest > limit:
            raise ValueError(
                f"language model '{config.model_type}': its RoPE ({kind}) depends on a row's longest sample beyond "
                f"{limit} tokens, found {longest}: the samples of a padding-free row would change each other; set "
                f"max_seq_len (and execution.row_multiple) to at most {limit}, or choose another model"
            )
