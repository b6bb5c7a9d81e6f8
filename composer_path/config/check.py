"""Checks a YAML's plain values against the schema; every mistake is one line: where, what was found, what to do."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from composer_path.config.schema import Choice, Key, Node, Section
from composer_path.config.sections import config_schema
from composer_path.config.types import choices_of, describe, fits, mentions

UNREADABLE = object()  # stands where an interpolation failed, which is already reported


def check_keys(values: Any, problems: list[str]) -> dict[str, Any]:
    """Check every key; mistakes are added to `problems`.

    Args:
        values: The configuration as plain mappings, with what its sections leave out filled in.
        problems: Gets a line for each mistake.

    Returns:
        What is known of it: an unknown key, or a section that can't be read, isn't there.
    """
    return _check_section(values, config_schema(), "", problems)


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
        return None
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

    items = value if isinstance(value, list) else [value]
    if not fits(value, key.annotation):
        example = ", a time such as 1ep or 500ba" if mentions(key.annotation, Time) else ""
        words = choices_of(key.annotation)
        wrong = next((item for item in items if isinstance(item, str) and item not in words), value)
        near = difflib.get_close_matches(str(wrong), words, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it must be {describe(key.annotation)}{example}"
        problems.append(f"{path}: found {_show(wrong if near else value)}; {hint}{_unquoted(value)}")
        return value
    for number in _numbers(value):
        if not math.isfinite(number):
            problems.append(f"{path}: found {number}; it must be a finite number")
        elif key.at_least is not None and number < key.at_least:
            problems.append(f"{path}: found {number}; it must be at least {key.at_least}")
    try:
        for item in items:
            if item is not None and key.check is not None:
                key.check(item)
    except ValueError as error:
        problems.append(f"{path}: {str(error).splitlines()[0]}")
    return value


def _numbers(value: Any) -> Iterator[int | float]:
    """All numbers in a value."""
    if isinstance(value, list | Mapping):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


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
        return f"it must be {describe(node.annotation)}"
    names = node.keys if isinstance(node, Section) else [node.selector]
    return f"it must be a mapping of {_some(names)}"


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
