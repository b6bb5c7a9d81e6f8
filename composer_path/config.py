"""The YAML's way in: load, merge overrides, check everything, and list all mistakes together."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from composer_path.config_schema import Choice, Key, Node, Section, config_schema
from composer_path.config_types import describe, fits, mentions

# An environment variable is read only where the YAML names it; oc.decode makes a number of its text.
RESOLVERS = {"oc.env", "oc.decode"}
RESOLVER = re.compile(r"\$\{\s*([\w.]+)\s*:")
_UNREADABLE = object()  # stands where an interpolation failed, which is already reported


class ConfigError(ValueError):
    """All mistakes of a YAML and its overrides, one a line: where, what was found, what to do.

    Args:
        source: The YAML's path.
        problems: The lines.
    """

    def __init__(self, source: str | Path, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        super().__init__("\n  ".join([f"{source}: {count}", *problems]))


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> DictConfig:
    """A YAML with overrides, checked before anything is built.

    Args:
        path: The YAML.
        overrides: `key=value` with dots between the levels; the value is read as YAML. A mapping is merged into what
            is there; `null` empties a key.

    Returns:
        The configuration with its interpolations as they stand (they are filled in when a value is read), so that it
        can be written beside the results without the values of environment variables. `variables`, `algorithms`,
        `callbacks` and `loggers` are always mappings, and `eval_loader` is None where it isn't given.

    Raises:
        ConfigError: Lists every problem.
    """
    problems: list[str] = []
    config = _read(path, overrides, problems)
    schema = config_schema()
    checked = _check_section(_resolve(config, "", problems), schema, "", problems)
    _check_agreement(checked, problems)
    if problems:
        raise ConfigError(path, problems)
    for section in ("variables", "algorithms", "callbacks", "loggers"):
        if config.get(section) is None:
            config[section] = {}
    config.setdefault("eval_loader", None)
    return config


def _read(path: str | Path, overrides: Iterable[str], problems: list[str]) -> DictConfig:
    """The YAML as it stands, with the overrides merged in."""
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise ConfigError(path, ["there is no such file"]) from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(path, [f"can't be read as YAML: {' '.join(str(error).split())}"]) from error
    if not isinstance(config, DictConfig):
        raise ConfigError(path, ["must be a mapping of sections, found a list"])
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip():
            problems.append(f"override '{override}': it must be key=value, as in trainer.max_duration=2ep")
            continue
        try:
            config.merge_with_dotlist([override])
        except (YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
            problems.append(f"override '{override}': can't be applied: {str(error).splitlines()[0]}")
    return config


def _resolve(node: Any, path: str, problems: list[str]) -> Any:
    """Plain values instead of interpolations; those that fail and those left at ??? are reported."""
    if not OmegaConf.is_config(node):
        return node
    is_list = OmegaConf.is_list(node)
    raw: Any = OmegaConf.to_container(node, resolve=False)
    plain: dict[Any, Any] = {}
    for key in range(len(node)) if is_list else list(node):
        where = f"{path}[{key}]" if is_list else _join(path, key)
        plain[key] = _UNREADABLE
        if OmegaConf.is_missing(node, key):
            problems.append(f"{where}: found ???; give a value, here or as the override {where}=...")
            continue
        text = str(raw[key]) if OmegaConf.is_interpolation(node, key) else ""
        if set(RESOLVER.findall(text)) - RESOLVERS:
            problems.append(f"{where}: found {text}; filled in are ${{other.key}} and ${{oc.env:NAME}} only")
            continue
        try:
            value = node[key]
        except OmegaConfBaseException as error:
            problems.append(f"{where}: found {text}, which can't be filled in: {_reason(error)}")
            continue
        plain[key] = _resolve(value, where, problems)
    return list(plain.values()) if is_list else plain


def _check_section(values: Any, section: Section, path: str, problems: list[str]) -> dict[str, Any]:
    """Every key of a section; returns those that are known."""
    if not isinstance(values, Mapping):
        if values is not _UNREADABLE:
            problems.append(f"{path}: found {_show(values)}; it must be a mapping of {_some(section.keys)}")
        return {}
    checked: dict[str, Any] = {}
    for key, value in values.items():
        where = _join(path, key)
        if key in section.refused:
            problems.append(f"{where}: is not set here; {section.refused[key]}")
        elif key in section.keys:
            checked[key] = _check(value, section.keys[key], where, problems)
        elif section.open:
            checked[key] = value
        else:
            problems.append(f"{where}: unknown key; {_nearest(str(key), section, path)}")
    for key, node in section.keys.items():
        if node.required and key not in values:
            near = difflib.get_close_matches(key, [str(name) for name in values if name not in section.keys], n=1)
            problems.append(f"{_join(path, key)}: is missing; {_wanted(node)}{f' (is it {near[0]}?)' if near else ''}")
    return checked


def _check(value: Any, node: Node, path: str, problems: list[str]) -> Any:
    if value is _UNREADABLE:
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
    where = _join(path, choice.selector)
    selected = values.get(choice.selector, choice.default)
    if selected is _UNREADABLE:
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
        return default if node is None or node is _UNREADABLE else node

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
    if get("eval_loader") is None:
        for key in ("eval_interval", "eval_subset_num_batches"):
            if get(f"trainer.{key}") is not None:
                problems.append(f"trainer.{key}: does nothing without the section eval_loader; add it or remove this")
    checkpointed = get("trainer.parallelism_config.fsdp.activation_checkpointing")
    if (
        isinstance(checkpointed, list)
        and "vision_blocks" in checkpointed
        and trainable
        and "vision_encoder" not in trainable
    ):
        problems.append(
            "trainer.parallelism_config.fsdp.activation_checkpointing: vision_blocks does nothing while vision_encoder "
            "is frozen (it runs without gradients); remove it"
        )
    for name in ("train_loader", "eval_loader"):
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
        return f"did you mean {_join(path, near[0])}?"
    elsewhere = [place for place in _places(key, config_schema(), "") if _join(path, key) != place]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere[:2])}?"
    return f"there are {_some(names)}" if names else "it takes no keywords"


def _places(key: str, node: Node, path: str) -> list[str]:
    """Where in the whole YAML a key of this name may stand."""
    if isinstance(node, Key):
        return []
    sections = [node] if isinstance(node, Section) else list(node.sections.values())
    places = [_join(path, key) for section in sections if key in section.keys]
    for section in sections:
        for name, member in section.keys.items():
            places += _places(key, member, _join(path, name))
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


def _reason(error: Exception) -> str:
    """OmegaConf's own words without the name of its exception."""
    return str(error).splitlines()[0].removeprefix("KeyError raised while resolving interpolation: ").strip('"')


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


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
