"""RoPE in a model's configuration: in the words of transformers 4 or 5, and whether it depends on how long a row is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from transformers import PretrainedConfig

TRANSFORMERS_MAJOR = int(transformers.__version__.split(".")[0])
ORIGINAL = "original_max_position_embeddings"
# What each kind needs beside `rope_theta`.
KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
}
AT_LEAST_1 = {"factor", ORIGINAL}


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
    local = parameters.get("sliding_attention") if isinstance(parameters, Mapping) else None
    of_two = set(parameters) == {"sliding_attention", "full_attention"}
    if isinstance(local, Mapping) and of_two and hasattr(config, "rope_local_base_freq") and _kind(local) == "default":
        config.rope_local_base_freq = local["rope_theta"]  # of Gemma 3, which has its own word for it
        parameters = parameters["full_attention"]
    config.update(old_rope_keys(parameters))
    del config.rope_parameters


def _ropes(config: PretrainedConfig) -> list[Mapping[str, Any]]:
    """The settings of RoPE: one for all layers, or one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if not isinstance(parameters, Mapping):
        raise ValueError(
            f"language model '{config.model_type}': its RoPE must be a mapping, found {parameters!r}; correct it"
        )
    of_layers = [value for value in parameters.values() if isinstance(value, Mapping)]
    return of_layers or [parameters]


def _kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def check_rope_known(config: PretrainedConfig) -> None:
    """Refuse, by name, a RoPE of an unknown kind, or with numbers of which no frequencies can be made.

    Raises:
        ValueError: So it is.
    """
    where = f"language model '{config.model_type}': its RoPE"
    shared = {
        key: getattr(config, key, None) for key in ("rope_theta", "rope_local_base_freq", "partial_rotary_factor")
    }
    for rope in _ropes(config):
        if (kind := _kind(rope)) not in KINDS:
            raise ValueError(f"{where} must be one of {', '.join(KINDS)}, found {kind!r}; choose another model")
        needed = KINDS[kind]
        if kind == "longrope" and TRANSFORMERS_MAJOR < 5 and getattr(config, ORIGINAL, None) is None:
            needed += ("factor",) if rope.get("attention_factor") is None else ()  # transformers 5 divides the lengths
        values = shared | {key: getattr(config, key, None) for key in needed} | dict(rope)
        for key in (*needed, "rope_theta", "rope_local_base_freq", "partial_rotary_factor"):
            value = values.get(key)
            if value is None and key not in needed:
                continue
            low, numbers = float(key in AT_LEAST_1), value if isinstance(value, list) else [value]
            most = 1.0 if key == "partial_rotary_factor" else 1e12
            if key in ("short_factor", "long_factor"):
                wanted, right = "a list of numbers above 0", isinstance(value, list) and len(numbers) > 0
            else:
                wanted, right = f"a number from {low:g} to {most:g}", not isinstance(value, list)
            if not right or not all(_lies(number, max(low, 1e-12), most) for number in numbers):
                found = "nothing" if value is None else f"{value!r:.80}"
                raise ValueError(f"{where} ({kind}) needs {key} to be {wanted}, found {found}; correct it")


def _lies(value: object, low: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= most


def check_rope_supported(config: PretrainedConfig, longest: int) -> None:
    """Refuse, by name, a RoPE that turns a sample of a row otherwise because of a longer one beside it.

    Transformers takes the frequencies of such kinds (`dynamic`, `longrope`) from the longest sample of a row. Up to the
    length that the model was first trained with they are the same for all: its own, or `short_factor`'s. Beyond it each
    length has its own (`dynamic`), or those of `long_factor`, which shorter samples alone would not get.

    Args:
        config: Of the language model.
        longest: Tokens of the longest sample.

    Raises:
        ValueError: It does, at this length.
    """
    for rope in _ropes(config):
        kind = _kind(rope)
        one_table = kind == "longrope" and rope["short_factor"] == rope["long_factor"]
        if kind not in ("dynamic", "longrope") or one_table:
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
