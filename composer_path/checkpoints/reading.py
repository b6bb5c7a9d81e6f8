"""Reads a checkpoint into a run, through the gate: sharded or a single file, into a sharded run or a whole one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from composer.core import State
from composer.loggers import Logger
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from composer_path.checkpoints.folder import reason
from composer_path.checkpoints.gate import read_pickle
from composer_path.checkpoints.guarded import GuardedReader, load_sharded
from composer_path.checkpoints.manifest import CheckpointError, DamagedError
from composer_path.checkpoints.metadata_file import METADATA
from composer_path.checkpoints.saver import contents

# What a run can do without: it begins anew there. (Of more ranks than saved, random states are their own.)
_MAY_BE_MISSING = ("state.callbacks.", "state.dataset_state.", "state.algorithms.", "rng", "composer_path")
# Hyperparameters of a newer torch; they come from the YAML anyway.
_OF_THE_YAML = "param_groups"


def is_of_this_format(path: Path) -> bool:
    """Whether a checkpoint without a manifest was written by a version that writes one; DamagedError: it is none."""
    if path.is_file():
        return False
    if not (path / METADATA).is_file():
        raise DamagedError(f"{METADATA} is missing")
    try:
        return "composer_path" in GuardedReader(path).read_metadata().state_dict_metadata
    except (ValueError, OSError) as error:
        raise DamagedError(reason(error)) from None


def load_into(path: Path, state: State, logger: Logger, weights_only: bool = False) -> list[dict[str, Any]]:
    """Give a run the weights, or everything, of a checkpoint; returns the random states of the ranks that saved it.

    Raises:
        CheckpointError: It doesn't fit this run, or can't be read.
    """
    template = contents(state)
    if weights_only:
        template = {"state": {"model": template["state"]["model"]}}
    try:
        content = _read_file(path, template) if path.is_file() else _read_folder(path, template)
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {path}: can't be taken: {reason(error)}") from None
    run_name = state.run_name
    with torch.no_grad():
        state.load_state_dict(content["state"], logger, strict=True)
    state.run_name = run_name
    return content.get("rng", [])


def _read_folder(path: Path, template: dict[str, Any]) -> dict[str, Any]:
    reader = GuardedReader(path)
    present = reader.read_metadata().state_dict_metadata
    never_moved = _set_aside(template, present)
    _fit(template, present)
    with torch.no_grad():
        load_sharded(template, reader)
    return _put_back(template, never_moved)


def _read_file(path: Path, template: dict[str, Any]) -> dict[str, Any]:
    """A single file has everything as whole tensors on every rank."""
    content = read_pickle(path)
    if not isinstance(content, dict) or not isinstance(content.get("state"), dict):
        raise ValueError("it is no checkpoint of a run: it has no 'state'")
    present = dict(_leaves(content))
    never_moved = _set_aside(template, present)
    _fit(template, present)
    with torch.no_grad():
        return _put_back(_filled(template, content), never_moved)


def _set_aside(template: dict[str, Any], present: Iterable[str]) -> dict[tuple[str, str], Any]:
    """Take out what the optimizer would hold of weights that were frozen before their first step: nothing was saved.

    Their names are those of the optimizer and of the weight. A checkpoint without any moments is left to `_fit`.
    """
    names = sorted(present)
    aside: dict[tuple[str, str], Any] = {}
    for optimizer, content in template["state"].get("optimizers", {}).items():
        path = f"state.optimizers.{optimizer}.state."
        lacking = []
        for weight in content["state"]:
            at = bisect_left(names, f"{path}{weight}.")
            if at == len(names) or not names[at].startswith(f"{path}{weight}."):
                lacking.append(weight)
        if len(lacking) < len(content["state"]):
            aside |= {(optimizer, weight): content["state"].pop(weight) for weight in lacking}
    return aside


def _put_back(content: dict[str, Any], aside: Mapping[tuple[str, str], Any]) -> dict[str, Any]:
    """The content with those again, as they are before a first step."""
    for (optimizer, weight), moments in aside.items():
        if "step" in moments:
            moments["step"] = moments["step"] * 0
        content["state"]["optimizers"][optimizer]["state"][weight] = moments
    return content


def _filled(template: Any, content: Any) -> Any:
    """The content in the template's form: sharded where that is sharded."""
    if isinstance(template, Mapping) and isinstance(content, Mapping):
        return {key: _filled(value, content[key]) for key, value in template.items()}
    if isinstance(template, list) and isinstance(content, list):
        return [_filled(value, content[at]) for at, value in enumerate(template)]
    if isinstance(template, Tensor):
        if not isinstance(content, Tensor) or template.shape != content.shape:
            raise ValueError("a tensor of another shape stands where the run has one")
        content = content.to(device=template.device, dtype=template.dtype)
        if isinstance(template, DTensor):
            return distribute_tensor(content, template.device_mesh, template.placements)
    return content


def _fit(template: dict[str, Any], present: Mapping[str, Any]) -> None:
    """Take out of the template what a run can do without; CheckpointError where the two don't fit."""
    names = set(present)
    if "rng" in template:
        saved = {key.split(".")[1] for key in names if key.startswith("rng.")}
        template["rng"] = template["rng"][: len(saved)]
    wanted = [key for key, _ in _leaves(template)]
    missing = [key for key in wanted if key not in names]
    needed = [key for key in missing if not key.startswith(_MAY_BE_MISSING) and _OF_THE_YAML not in key]
    left_over = sorted({key for key in names if key.startswith("state.model.")} - set(wanted))
    parts = {"lacks": needed, "holds in addition": left_over}
    if problems := [f"{word} {len(keys)} entries, such as {keys[0]}" for word, keys in parts.items() if keys]:
        raise CheckpointError(f"it {' and '.join(problems)}; this run trains other modules, or another model")
    for key in missing:
        of_a_part = key.startswith(("state.callbacks.", "state.algorithms."))
        _drop(template, ".".join(key.split(".")[:3]) if of_a_part else key)
    if not template["state"].get("algorithms", True):  # an earlier version wrote all of them as one entry, even none
        del template["state"]["algorithms"]


def _leaves(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What torch.distributed.checkpoint writes as entries of their own, by its names for them."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(content, list) and not _is_leaf(content):
        for at, value in enumerate(content):
            yield from _leaves(value, f"{path}.{at}")
    else:
        yield path, content


def _is_leaf(value: list[Any]) -> bool:
    return not any(isinstance(one, Mapping | Tensor) or (isinstance(one, list) and not _is_leaf(one)) for one in value)


def _drop(content: Any, key: str) -> None:
    """Take what has this name out."""
    for name in list(content) if isinstance(content, Mapping) else range(len(content)):
        if str(name) == key:
            del content[name]
            return
        if key.startswith(f"{name}."):
            _drop(content[name], key[len(str(name)) + 1 :])
            return
