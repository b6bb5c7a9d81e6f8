"""Checks a YAML's plain values against the schema; every mistake is one line: where, what was found, what to do.

Unknown and missing keys and wrong types are found here. Why a known key isn't set in a YAML stands in sections.py
(`refused`, `elsewhere`), of algorithms and callbacks in run/verdicts.py, of optimizers in run/optimizer.py; rules of
single values in rules.py, keys that contradict each other in agreement.py, files in files.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from composer.core import Time

from composer_path.config.interpolations import UNREADABLE
from composer_path.config.schema import REQUIRED, Choice, Key, Node, Section, join
from composer_path.config.sections import config_schema
from composer_path.config.types import choices_of, describe, fits, hint, mentions, nearest
from composer_path.storage.errors import StorageError

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")  # and halves of a character; but line ends


def check_keys(value: Any, node: Node, path: str = "") -> Iterator[str]:
    """The mistakes of a plain, complete value and of what is in it; one that is `UNREADABLE` is already reported."""
    if value is UNREADABLE:
        return
    if isinstance(node, Key):
        yield from _check_value(value, node, path)
    elif value is None:
        if node.default is REQUIRED:
            yield f"{path}: found null; {_wanted(node)}"
    elif not isinstance(value, Mapping):
        yield f"{path}: found {_show(value)}; {_wanted(node)}"
    elif isinstance(node, Section):
        yield from _check_section(value, node, path)
    else:
        yield from _check_choice(value, node, path)


def _check_section(values: Mapping[Any, Any], section: Section, path: str) -> Iterator[str]:
    for key, value in values.items():
        where, node = join(path, key), section.keys.get(key, section.members)
        if key in section.refused:
            yield f"{where}: is not set here; {section.refused[key]}"
        elif node is not None:
            yield from check_keys(value, node, where)
        elif not section.open:
            yield f"{where}: unknown key; {_known(key, section, path)}"
    for key, node in section.keys.items():
        if node.default is REQUIRED and key not in values:
            near = nearest(key, (name for name in values if name not in section.keys))
            yield f"{join(path, key)}: is missing; {_wanted(node)}{f' (is it {near}?)' if near else ''}"


def _check_choice(values: Mapping[Any, Any], choice: Choice, path: str) -> Iterator[str]:
    selected = values.get(choice.selector)
    section = choice.section(selected)
    if section is not None:
        of_its_own = section is choice.otherwise  # which has the selector as a key
        rest = {key: value for key, value in values.items() if of_its_own or key != choice.selector}
        yield from _check_section(rest, section, path)
    elif isinstance(selected, str) and selected in choice.refused:
        yield f"{join(path, choice.selector)}: found '{selected}'; {choice.refused[selected]}"
    elif selected is not UNREADABLE:
        found = "is missing" if selected is None else f"found {_show(selected)}"
        fix = hint(selected, choice.sections, f"it must be one of {_some(choice.sections)}")
        yield f"{join(path, choice.selector)}: {found}; {fix}{_unquoted(selected)}"


def _check_value(value: Any, key: Key, path: str) -> Iterator[str]:
    leaves, items = _leaves(value), value if isinstance(value, list) else [value]
    if UNREADABLE in leaves:
        return
    if not fits(value, key.annotation):
        words = choices_of(key.annotation)
        wrong = next((item for item in items if isinstance(item, str) and item not in words), value)
        example = ", a time such as 1ep or 500ba" if mentions(key.annotation, Time) else ""
        fix = hint(wrong, words, f"it must be {describe(key.annotation)}{example}")
        yield f"{path}: found {_show(wrong if nearest(wrong, words) else value)}; {fix}{_unquoted(value)}"
        return
    for text in [leaf for leaf in leaves if isinstance(leaf, str) and CONTROL.search(leaf)]:
        yield f"{path}: found {_show(text)}; it must be text without control characters"
    for number in [leaf for leaf in leaves if isinstance(leaf, int | float) and not isinstance(leaf, bool)]:
        if not math.isfinite(number):
            yield f"{path}: found {number}; it must be a finite number"
        elif key.at_least is not None and number < key.at_least:
            yield f"{path}: found {number}; it must be at least {key.at_least}"
        elif isinstance(number, int) and number > key.at_most:
            yield f"{path}: found {number}; it must be at most {key.at_most:,}"
    try:
        for item in items:
            if item is not None and key.check is not None:
                key.check(item)
    except (ValueError, StorageError) as error:
        yield f"{path}: {str(error).splitlines()[0]}"


def _leaves(value: Any) -> list[Any]:
    """All values in a list or mapping, or the value itself."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, list) else [value]


def _known(key: Any, section: Section, path: str) -> str:
    """The nearest name in this section, else where this very key belongs, else what there is."""
    if near := nearest(key, section.keys):
        return f"did you mean {join(path, near)}?"
    elsewhere = dict.fromkeys(place for place in _places(str(key), config_schema()) if place != join(path, key))
    if elsewhere:
        return f"did you mean {' or '.join(sorted(elsewhere, key=lambda place: place.count('.'))[:2])}?"
    return f"there are {_some(section.keys)}" if section.keys else "it takes no keywords"


def _places(key: str, node: Node, path: str = "") -> Iterator[str]:
    """Where in the whole YAML a key of this name may stand."""
    sections = [node] if isinstance(node, Section) else [*getattr(node, "sections", {}).values()]
    if isinstance(node, Choice) and node.otherwise is not None:
        sections.append(node.otherwise)
    for section in sections:
        for name, member in section.keys.items():
            if name == key:
                yield join(path, key)
            yield from _places(key, member, join(path, name))


def _wanted(node: Node) -> str:
    if isinstance(node, Key):
        return f"it must be {describe(node.annotation)}"
    if isinstance(node, Choice):
        return f"it must be a mapping with {node.selector}"
    if node.members is not None:
        return f"it must be a mapping of names of your own to {_some(node.members.keys)}"
    return "it must be a mapping" + (f" of {_some(node.keys)}" if node.keys else "")


def _some(names: Iterable[Any]) -> str:
    """Names for a message, cut where a list would be too long to read."""
    words = list(map(str, names))
    return ", ".join(words[:14]) + (f", ... ({len(words)} in all)" if len(words) > 14 else "")


def _unquoted(value: Any) -> str:
    """A hint for a number that came as text."""
    try:
        float(value if isinstance(value, str) else "")
    except ValueError:
        return ""
    return " (without quotes; from an environment variable: ${oc.decode:${oc.env:NAME}})"


def _show(value: Any) -> str:
    if isinstance(value, list | Mapping):
        return f"a list of {len(value)}" if isinstance(value, list) else "a mapping"
    if isinstance(value, str):
        return f"the text '{value}'"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
