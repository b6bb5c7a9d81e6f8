"""Whether a value from a YAML fits a Python annotation, and how to say in plain words what would fit."""

from __future__ import annotations

import collections.abc
import inspect
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

LISTS = (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def resolve_annotation(parameter: inspect.Parameter, function: Callable[..., Any]) -> Any:
    """The type behind a parameter's annotation, which may be text.

    Raises:
        TypeError: There is none, or it can't be resolved: the key would go unchecked. An error of ours.
    """
    found: Any = parameter.annotation
    if not isinstance(found, str) and found is not parameter.empty:
        return found
    try:
        return eval(found, getattr(inspect.unwrap(function), "__globals__", {}))  # type: ignore[arg-type]
    except (NameError, TypeError) as error:
        raise TypeError(
            f"{function.__module__}.{function.__qualname__}, parameter {parameter.name}: its annotation can't be "
            f"resolved ({error}); import its names where they run, or state the type in config/sections.py"
        ) from error


def fits(value: Any, annotation: Any) -> bool:
    """Whether a YAML value satisfies an annotation.

    Stricter than Python on one point (true is no number), and easier on three that YAML can't say: a whole number is
    a float, a list is a tuple, text is a path. A type that YAML has no word for (a tensor, a function) fits nothing.
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is Any or annotation is object or isinstance(annotation, TypeVar):
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, member) for member in args)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in args)
    if annotation is None or annotation is type(None):
        return value is None
    if origin in LISTS or annotation in LISTS:
        return isinstance(value, list) and _items_fit(value, origin or annotation, args)
    if origin in MAPPINGS or annotation in MAPPINGS:
        return isinstance(value, Mapping) and (
            not args or all(fits(key, args[0]) and fits(item, args[1]) for key, item in value.items())
        )
    if isinstance(value, bool) or annotation is bool:
        return isinstance(value, bool) and annotation is bool
    if annotation is float:
        return isinstance(value, int | float)
    if annotation is Path:
        return isinstance(value, str)
    return isinstance(annotation, type) and annotation in (int, str) and isinstance(value, annotation)


def _items_fit(values: list[Any], kind: Any, args: tuple[Any, ...]) -> bool:
    if not args:
        return True
    if kind is tuple and args[-1] is not Ellipsis:
        return len(values) == len(args) and all(map(fits, values, args))
    return all(fits(value, args[0]) for value in values)


def mentions(annotation: Any, wanted: Any) -> bool:
    """Whether a type stands anywhere in an annotation."""
    return annotation is wanted or any(mentions(member, wanted) for member in get_args(annotation))


def choices_of(annotation: Any) -> list[str]:
    """The words that an annotation allows, wherever they stand in it."""
    if get_origin(annotation) is Literal:
        return [choice for choice in get_args(annotation) if isinstance(choice, str)]
    return [choice for member in get_args(annotation) for choice in choices_of(member)]


def describe(annotation: Any) -> str:
    """What YAML could say here: "a whole number or null"."""
    return " or ".join(dict.fromkeys(_words(annotation))) or "nothing that a YAML can say"


def _words(annotation: Any) -> list[str]:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        members = sorted(args, key=lambda member: member is type(None))  # null is said last
        return [word for member in members for word in _words(member)]
    if origin is Literal:
        return [repr(choice) if isinstance(choice, str) else str(choice).lower() for choice in args]
    if origin in LISTS or annotation in LISTS:
        return [_words_for_list(origin or annotation, args)]
    if origin in MAPPINGS or annotation in MAPPINGS:
        values = f" of names to {describe(args[1])}" if args and args[1] is not Any else ""
        return [f"a mapping{values}"]
    plain = {
        int: "a whole number",
        float: "a number",
        str: "text",
        Path: "text",
        bool: "true or false",
        type(None): "null",
        None: "null",
        Any: "anything",
    }
    return [plain[annotation]] if annotation in plain else []


def _words_for_list(kind: Any, args: tuple[Any, ...]) -> str:
    if not args or args[0] is Any:
        return "a list"
    if kind is tuple and args[-1] is not Ellipsis:
        return f"a list of {len(args)}: {', '.join(describe(member) for member in args)}"
    return f"a list of: {describe(args[0])}"
