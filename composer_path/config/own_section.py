"""The section of a class of one's own: its signature; a type that isn't said or can't be found is any value."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Collection
from typing import Any

from composer_path.config.schema import ABSENT, REQUIRED, Key, NoDefault, Section, key_of


def own_section(cls: Any, leave_out: Collection[str] = (), default: Any = ABSENT) -> Section:
    """The keywords of a class, with those that it passes on to its parents as **keywords.

    Args:
        cls: The class.
        leave_out: Keywords that the run supplies.
        default: Of the section itself.
    """
    keys: dict[str, Key] = {}
    is_open = False
    for one in [one for one in cls.__mro__ if "__init__" in vars(one)]:
        parameters = list(inspect.signature(one.__init__).parameters.values())[1:]
        types = _types_of(one.__init__)
        for p in parameters:
            named = p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            if named and p.name not in leave_out and p.name not in keys:
                given = REQUIRED if p.default is p.empty else p.default
                keys[p.name] = _key(types.get(p.name, Any), given)
        passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters)
        # Composer's base classes take (*args, **kwargs) and drop them.
        is_open = passes_on and not any(p.kind is p.VAR_POSITIONAL for p in parameters)
        if not passes_on:
            break
    return Section(keys, default, open=is_open)


def _types_of(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except Exception:  # a name that is imported for type checkers only, or whatever one's own text comes to
        found = getattr(function, "__annotations__", {})
        return {name: kind for name, kind in found.items() if not isinstance(kind, str)}


def _key(annotation: Any, default: Any) -> Key:
    """A key without the rules that go by names in Composer's classes; a moment is a moment, though."""
    annotation = getattr(annotation, "__supertype__", getattr(annotation, "__value__", annotation))
    if annotation is None:
        annotation = type(None)
    if default is None and annotation is not Any:
        annotation = annotation | None if not isinstance(annotation, str) else Any
    key = key_of("", annotation, default)
    if isinstance(default, str) and default.startswith("${"):  # no words of ours
        return key_of("", annotation, ABSENT)
    return key if not isinstance(key.default, NoDefault) or key.default is REQUIRED else key_of("", annotation, ABSENT)
