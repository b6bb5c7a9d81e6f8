"""Checks a YAML's plain values against the schema; every mistake is one line: where, what was found, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from composer_path.config.schema import Choice, Key, Node, Section, config_schema
from composer_path.config.types import describe, fits, mentions

UNREADABLE = object()  # stands where an interpolation failed, which is already reported


def check_config(values: Any, problems: list[str]) -> None:
    """Check every key, and what several keys say together; mistakes are added to `problems`."""
    _check_agreement(_check_section(values, config_schema(), "", problems), problems)


def join(path: str, key: Any) -> str:
    """The path of a key below another."""
    return f"{path}.{key}" if path else str(key)


def _check_section(values: Any, section: Section, path: str, problems: list[str]) -> dict[str, Any]:
    """Every key of a section; returns those that are known."""
    if not isinstance(values, Mapping):
        if values is not UNREADABLE:
            problems.append(f"{path}: found {_show(values)}; it must be a mapping of {_some(section.keys)}")
        return {}
    checked: dict[str, Any] = {}
    for key, value in values.items():
        where = join(path, key)
        if key in section.refused:
            problems.append(f"{where}: is not set here; {section.refused[key]}")
        elif key in section.keys:
            checked[key] = _check(value, section.keys[key], where, problems)
        elif section.members is not None:
            checked[key] = _check(value, section.members, where, problems)
        elif section.open:
            checked[key] = value
        else:
            problems.append(f"{where}: unknown key; {_nearest(str(key), section, path)}")
    for key, node in section.keys.items():
        if node.required and key not in values:
            near = difflib.get_close_matches(key, [str(name) for name in values if name not in section.keys], n=1)
            problems.append(f"{join(path, key)}: is missing; {_wanted(node)}{f' (is it {near[0]}?)' if near else ''}")
    if section.check is not None and all(isinstance(value, Mapping) for value in values.values()):
        try:
            section.check(values)
        except ValueError as error:
            problems.append(f"{path.removesuffix('.streams')}.{error}")
        except TypeError:  # a value of the wrong type, which is already reported
            pass
    return checked


def _check(value: Any, node: Node, path: str, problems: list[str]) -> Any:
    if value is UNREADABLE:
        return value
    if isinstance(node, Key):
        return _check_value(value, node, path, problems)
    if value is None:
        if node.required:
            problems.append(f"{path}: found null; {_wanted(node)}")
            return {}
        # An empty section in a list of named ones (`lr_monitor:`) means no keywords, elsewhere that it isn't used.
        return {} if path.startswith(("algorithms.", "callbacks.", "loggers.")) else None
    if isinstance(node, Section):
        return _check_section(value, node, path, problems)
    return _check_choice(value, node, path, problems)


def _check_choice(values: Any, choice: Choice, path: str, problems: list[str]) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        problems.append(f"{path}: found {_show(values)}; it must be a mapping with {choice.selector}")
        return {}
    where = join(path, choice.selector)
    selected = values.get(choice.selector, choice.default)
    if selected is UNREADABLE:
        return {}
    names = {str(name): name for name in choice.sections}
    if isinstance(selected, bool) or str(selected) not in names:
        near = difflib.get_close_matches(str(selected), names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it must be one of {_some(names)}"
        found = "is missing" if selected is None else f"found {_show(selected)}"
        problems.append(f"{where}: {found}; {hint}")
        return {}
    name = names[str(selected)]
    rest = {key: value for key, value in values.items() if key != choice.selector}
    return {choice.selector: name, **_check_section(rest, choice.sections[name], path, problems)}


def _check_value(value: Any, key: Key, path: str, problems: list[str]) -> Any:
    from composer.core import Time

    if not fits(value, key.annotation):
        example = ", a time such as 1ep or 500ba" if mentions(key.annotation, Time) else ""
        problems.append(
            f"{path}: found {_show(value)}; it must be {describe(key.annotation)}{example}{_unquoted(value)}"
        )
        return value
    items = value if isinstance(value, list) else [value]
    for item in items if key.choices else []:
        if item is not None and item not in key.choices:
            near = difflib.get_close_matches(str(item), [str(choice) for choice in key.choices], n=1)
            hint = f"did you mean {near[0]}?" if near else f"it must be one of {_some(key.choices)}"
            problems.append(f"{path}: found {_show(item)}; {hint}")
    if key.at_least is not None and isinstance(value, int | float) and value < key.at_least:
        problems.append(f"{path}: found {value}; it must be at least {key.at_least}")
    says_time = mentions(key.annotation, Time) or path.endswith("interval")
    try:
        if says_time and isinstance(value, str):
            Time.from_timestring(value)
        if key.check is not None:
            key.check(value)
    except ValueError as error:
        hint = "; write a number and a unit, as in 1ep, 500ba, 0.03dur" if str(error).startswith("Invalid time") else ""
        problems.append(f"{path}: {str(error).splitlines()[0]}{hint}")
    return value


def _check_agreement(config: dict[str, Any], problems: list[str]) -> None:
    """What several keys say together. Looks only at what could be read."""

    def get(path: str, default: Any = None) -> Any:
        node: Any = config
        for key in path.split("."):
            node = node.get(key) if isinstance(node, Mapping) else None
        return default if node is None or node is UNREADABLE else node

    trainable = get("model.trainable")
    if trainable == []:
        problems.append("model.trainable: found an empty list; name what this stage trains, as in [projector]")
    trainable = trainable if isinstance(trainable, list) and trainable else None
    rates = get("optimizer.lr")
    if isinstance(rates, Mapping) and trainable:
        problems += [
            f"optimizer.lr.{name}: is not trained; {_did_you_mean(name, trainable)}"
            for name in rates
            if name not in trainable
        ]
        problems += [
            f"optimizer.lr.{name}: is missing; give each trained module a rate"
            for name in trainable
            if name not in rates
        ]
    model = get("model.language_model")
    if isinstance(model, Mapping) and (model.get("path") is None) == (model.get("config") is None):
        found = "neither" if model.get("path") is None else "both"
        problems.append(f"model.language_model: found {found} of path (weights) and config (random); give one of them")
    trainer = config.get("trainer")
    if isinstance(trainer, Mapping) and trainer.get("save_interval", "1ep") is None and trainer.get("autoresume"):
        problems.append(
            "trainer.autoresume: has nothing to go on from while save_interval is null; give an interval or remove this"
        )
    if "eval_loader" not in config:
        for key in ("eval_interval", "eval_subset_num_batches"):
            if get(f"trainer.{key}") is not None:
                problems.append(f"trainer.{key}: does nothing without the section eval_loader; add it or remove this")
    if get("execution.vision_chunk") is not None and trainable and "vision_encoder" in trainable:
        problems.append(
            "execution.vision_chunk: saves nothing where vision_encoder is trained (its activations are kept anyway); "
            "remove it"
        )
    for name in ("train_loader", "eval_loader"):
        # Without a folder of its own Streaming takes one in /tmp, which a second run can't use again.
        dataset = get(f"{name}.dataset")
        if isinstance(dataset, Mapping) and (dataset.get("local") is None) == (dataset.get("streams") is None):
            found = "found null" if "local" in dataset else "is missing"
            problems.append(
                f"{name}.dataset.local: is given beside streams; remove one of them"
                if dataset.get("local") is not None
                else f"{name}.dataset.local: {found}; it must be text: the folder of the shards, or of their cache "
                "(or give streams)"
            )
        most, longest = get(f"{name}.max_tokens_per_microbatch"), get(f"{name}.dataset.max_seq_len", 0)
        if isinstance(most, int) and isinstance(longest, int) and most < longest:
            problems.append(
                f"{name}.max_tokens_per_microbatch: found {most}, less than {name}.dataset.max_seq_len {longest}: one "
                "sample may not fit; raise the one or lower the other"
            )


def _nearest(key: str, section: Section, path: str) -> str:
    """The nearest name in this section, else where this very key belongs, else what there is."""
    names = [str(name) for name in section.keys]
    near = difflib.get_close_matches(key, names, n=1)
    if near:
        return f"did you mean {join(path, near[0])}?"
    elsewhere = [place for place in _places(key, config_schema(), "") if join(path, key) != place]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere[:2])}?"
    return f"there are {_some(names)}" if names else "it takes no keywords"


def _places(key: str, node: Node, path: str) -> list[str]:
    """Where in the whole YAML a key of this name may stand."""
    if isinstance(node, Key):
        return []
    sections = [node] if isinstance(node, Section) else list(node.sections.values())
    places = [join(path, key) for section in sections if key in section.keys]
    for section in sections:
        for name, member in section.keys.items():
            places += _places(key, member, join(path, name))
    return list(dict.fromkeys(places))


def _wanted(node: Node) -> str:
    if isinstance(node, Key):
        return f"it must be {_some(node.choices) if node.choices else describe(node.annotation)}"
    names = node.keys if isinstance(node, Section) else [node.selector]
    return f"it must be a mapping of {_some(names)}"


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {_some(names)}"


def _some(names: Iterable[Any]) -> str:
    """Names for a message, cut where a list would be too long to read."""
    words = ["null" if name is None else str(name) for name in names]
    return ", ".join(words[:14]) + (f", ... ({len(words)} in all)" if len(words) > 14 else "")


def _unquoted(value: Any) -> str:
    """A hint for a number that came as text."""
    try:
        float(value)
    except (TypeError, ValueError):
        return ""
    return (
        " (without quotes; from an environment variable: ${oc.decode:${oc.env:NAME}})" if isinstance(value, str) else ""
    )


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return "a mapping"
    return f"the text '{value}'" if isinstance(value, str) else str(value)
