"""What algorithms and callbacks ask of the rest of a YAML: each condition that isn't met is one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from composer.core import Time, TimeUnit

from composer_path.config.check import check_keys
from composer_path.config.schema import Section
from composer_path.config.sections import config_schema
from composer_path.config.types import hint
from composer_path.run.names import named_classes
from composer_path.run.verdicts import ON_GPUS, STOPPERS

Get = Callable[[str], Any]  # a value by its path; None where it isn't there or couldn't be read


def of_the_parts(get: Get) -> Iterator[str]:
    """Conditions of what is named in `algorithms` and `callbacks`."""
    algorithms, callbacks = ((value if isinstance(value := get(name), Mapping) else {}) for name in _SECTIONS)
    for name, keywords in algorithms.items():
        yield from _of_ours(name, keywords or {})
    if "ema" in algorithms and get("trainer.parallelism_config.fsdp.version") == 1:
        yield "algorithms.ema: can't average what FSDP 1 has flattened; take fsdp.version 2, or null as fsdp for DDP"
    if isinstance(unfreeze := algorithms.get("unfreeze"), Mapping):
        yield from _of_unfreeze(get, unfreeze)
    for name in [name for name in ON_GPUS if name in callbacks and get("trainer.device") == "cpu"]:
        yield f"callbacks.{name}: looks at a GPU's memory, and trainer.device is cpu; leave it out"
    for name in STOPPERS:
        if isinstance(stopper := callbacks.get(name), Mapping):
            yield from _of_a_stopper(get, f"callbacks.{name}", stopper)


_SECTIONS = ("algorithms", "callbacks")


def _of_ours(name: str, keywords: Any) -> Iterator[str]:
    """What the constructor of one of our algorithms says, which costs nothing to ask."""
    cls = named_classes("algorithms").get(name)
    section = config_schema().keys["algorithms"]
    node = section.keys.get(name) if isinstance(section, Section) else None
    if cls is None or node is None or cls.__module__.partition(".")[0] != "composer_path":
        return
    if not isinstance(keywords, Mapping) or any(check_keys(keywords, node)):  # already reported
        return
    try:
        cls(**keywords)
    except ValueError as error:
        yield f"algorithms.{name}: {str(error).removeprefix(f'{name}: ').removeprefix(f'{name}.')}"


def _of_unfreeze(get: Get, moments: Mapping[str, Any]) -> Iterator[str]:
    trainable = get("model.trainable")
    trainable = [str(name).partition(".")[0] for name in trainable] if isinstance(trainable, list) else []
    later = {name: moment for name, moment in moments.items() if moment is not None}
    if not later:
        yield "algorithms.unfreeze: names no module; give one its moment, as in language_model: 0.3dur, or leave it out"
    for name in [name for name in later if trainable and name not in trainable]:
        yield f"algorithms.unfreeze.{name}: is not trained; name it in model.trainable, which says what learns at all"
    if later and trainable and set(trainable) <= set(later):
        yield "algorithms.unfreeze: leaves nothing to train at first; leave out the module that learns from the start"
    for name, moment in later.items():
        if problem := _never_comes(moment, get("trainer.max_duration")):
            yield f"algorithms.unfreeze.{name}: {problem}"


def _never_comes(moment: Any, end: Any) -> str | None:
    """Why a moment is not within the run."""
    try:
        at, last = Time.from_timestring(str(moment)), Time.from_timestring(str(end))
    except ValueError:  # no time, which is already reported
        return None
    if at.unit == TimeUnit.DURATION:
        last = Time(1.0, TimeUnit.DURATION)
    if at.unit == last.unit and at.value >= last.value:
        return f"found {moment}, and the run ends at {last.to_timestring()}: it would never learn; give an earlier one"
    return None


def _of_a_stopper(get: Get, path: str, stopper: Mapping[str, Any]) -> Iterator[str]:
    """Composer raises at the first evaluation, or never asks, where there is no such metric."""
    more = get("eval_loaders")
    labels = (["heldout"] if get("eval_loader") is not None else []) + list(more if isinstance(more, Mapping) else [])
    label, metric = stopper.get("dataloader_label"), stopper.get("monitor")
    if not labels:
        yield f"{path}: watches an evaluation's metric, and there is no eval_loader; give it or leave this out"
    elif isinstance(label, str) and label not in labels:
        fix = hint(label, labels, f"there are {', '.join(labels)}")
        yield f"{path}.dataloader_label: found '{label}'; {fix}"
    if labels and isinstance(metric, str) and metric != "token_loss":
        yield f"{path}.monitor: found '{metric}'; it must be token_loss, what an evaluation measures"
