"""What a section of a YAML is: keys with their types, rules and defaults, read from the signatures that get them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Literal

from composer_path.config.rules import check_interval, check_moment
from composer_path.config.types import choices_of, fits, mentions, resolve_annotation


class Absent(Enum):
    """Stands for a default that isn't there, or that a YAML can't say (an object)."""

    ABSENT = "absent"


ABSENT = Absent.ABSENT


@dataclass(frozen=True)
class Key:
    """One value: its type, its default and further rules, which hold for each item where it is a list."""

    annotation: Any = Any
    required: bool = False
    default: Any = ABSENT
    at_least: int | None = None
    check: Callable[[Any], None] | None = None  # of what isn't null; raises ValueError


@dataclass(frozen=True)
class Section:
    """A mapping of known keys.

    Attributes:
        keys: What it may hold.
        required: Whether it must be there.
        refused: Keys that it may not hold, and what to do instead.
        open: Other keys are passed on unchecked.
        members: What stands under any other key, where names are free.
        left_out: What it is where it is left out. A section that may be `absent` is empty where it is null.
        check: Of the whole mapping, once its parts are right; raises ValueError.
    """

    keys: Mapping[str, Key | Section | Choice]
    required: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    open: bool = False
    members: Section | None = None
    left_out: Literal["null", "empty", "absent"] = "null"
    check: Callable[[Any], None] | None = None


@dataclass(frozen=True)
class Choice:
    """A mapping whose key `selector` says which other keys there are: `{name: adamw, …}`."""

    selector: str
    sections: Mapping[Any, Section]
    default: Any = None
    required: bool = False
    left_out: Literal["null"] = "null"


Node = Key | Section | Choice


def section_of(
    *functions: Callable[..., Any],
    leave_out: tuple[str, ...] = (),
    refused: Mapping[str, str] | None = None,
    changes: Mapping[str, Section | Choice | dict[str, Any]] | None = None,
    required: bool = False,
    left_out: Literal["null", "empty", "absent"] = "null",
) -> Section:
    """The keywords of a function or class as a section.

    Args:
        *functions: The constructor, and those to which it passes its further keywords on; the first signature that has
            a keyword counts.
        leave_out: Keywords that the run itself supplies.
        refused: Keywords that another key of the YAML says, and which.
        changes: Keys that are sections themselves, or in which fields of `Key` a key differs from the signature.
        required: Whether the section must be there.
        left_out: See `Section`.
    """
    changes, refused = changes or {}, refused or {}
    keys: dict[str, Node] = {}
    kinds: set[Any] = set()
    for function in functions:
        call = function.__init__ if inspect.isclass(function) else function  # type: ignore[misc]
        parameters = [p for p in inspect.signature(call).parameters.values() if p.name != "self"]
        kinds = {parameter.kind for parameter in parameters}
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if parameter.name not in (*leave_out, *refused, *keys):
                keys[parameter.name] = _key(parameter, call, changes.get(parameter.name, {}))
    # Composer's base classes take (*args, **kwargs) and drop them: their heirs without an __init__ have no keywords.
    passes_on = inspect.Parameter.VAR_KEYWORD in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds
    return Section(keys, required, refused, passes_on, left_out=left_out)


def _key(parameter: inspect.Parameter, function: Callable[..., Any], change: Node | dict[str, Any]) -> Node:
    if not isinstance(change, dict):
        return change
    if "annotation" not in change:
        change = {**change, "annotation": resolve_annotation(parameter, function)}
    if parameter.default is parameter.empty:
        return key_of(parameter.name, **{"required": True, **change})
    return key_of(parameter.name, **{"default": parameter.default, **change})


def key_of(name: str, annotation: Any, default: Any = ABSENT, **fields: Any) -> Key:
    """A key of a constructor; times are checked as what their name says."""
    from composer.core import Time

    if "off" in (words := choices_of(annotation)):
        annotation = Literal[(*words, False)]  # YAML reads a bare off as false
    key = Key(annotation, default=default)
    if mentions(annotation, Time) or (name.endswith("interval") and mentions(annotation, str)):
        key = replace(key, check=check_interval if name.endswith("interval") else check_moment)
    elif name.endswith("interval"):
        key = replace(key, at_least=1)
    key = replace(key, **fields)
    plain = _plain(key.default)
    return replace(key, default=plain if plain is ABSENT or fits(plain, key.annotation) else ABSENT)


def _plain(value: Any) -> Any:
    """A default as a YAML says it; `ABSENT` where it has no word for it."""
    if isinstance(value, tuple | list):
        items = [_plain(item) for item in value]
        return ABSENT if ABSENT in items else items
    sayable = value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))
    return value if sayable else ABSENT
