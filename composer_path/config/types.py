"""Whether a value from a YAML fits a Python annotation, and how to say in plain words what would fit."""

from __future__ import annotations

import collections.abc
import difflib
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from composer_path.printable import printable

UNIONS = (Union, types.UnionType)
LISTS = (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
# Annotation -> its words, and what YAML's values of it are in Python.
PLAIN: dict[Any, tuple[str, Any]] = {
    int: ("a whole number", int),
    float: ("a number", int | float),
    str: ("text", str),
    Path: ("text", str),
    bool: ("true or false", bool),
    types.NoneType: ("null", types.NoneType),
}

MAX_LINE = 800  # letters of a message


def on_a_line(message: str) -> str:
    """A message that a terminal can show, with its middle left out where it is long: the end says what to do."""
    line = printable(message)
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE // 2]} … {line[-MAX_LINE // 2 :]}"


def resolve_annotation(parameter: inspect.Parameter, function: Callable[..., Any]) -> Any:
    """The type behind a parameter's annotation, which may be text; TypeError (an error of ours) where there is none."""
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
    origin, args = get_origin(annotation) or annotation, get_args(annotation)
    if origin in (Any, object) or isinstance(origin, TypeVar):
        return True
    if origin in UNIONS:
        return any(fits(value, member) for member in args)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in args)
    if origin in LISTS:
        if not isinstance(value, list) or not args:
            return isinstance(value, list)
        members = args if _is_fixed(origin, args) else args[:1] * len(value)
        return len(members) == len(value) and all(map(fits, value, members))
    if origin in MAPPINGS:
        return isinstance(value, Mapping) and (
            not args or all(fits(key, args[0]) and fits(item, args[1]) for key, item in value.items())
        )
    return origin in PLAIN and isinstance(value, PLAIN[origin][1]) and isinstance(value, bool) == (origin is bool)


def _is_fixed(origin: Any, args: tuple[Any, ...]) -> bool:
    """Whether it is a tuple of so many items."""
    return origin is tuple and args[-1] is not Ellipsis


def mentions(annotation: Any, wanted: Any) -> bool:
    """Whether a type stands anywhere in an annotation."""
    return annotation is wanted or any(mentions(member, wanted) for member in get_args(annotation))


def choices_of(annotation: Any) -> list[str]:
    """The words that an annotation allows, wherever they stand in it."""
    if get_origin(annotation) is Literal:
        return [choice for choice in get_args(annotation) if isinstance(choice, str)]
    return [choice for member in get_args(annotation) for choice in choices_of(member)]


def nearest(word: Any, known: Iterable[Any]) -> str | None:
    """The known word that one may have meant."""
    return next(iter(difflib.get_close_matches(str(word), map(str, known), n=1)), None)


def hint(word: Any, known: Iterable[Any], otherwise: str) -> str:
    """The nearest known word as a question, or what is said where none is near."""
    return f"did you mean {near}?" if (near := nearest(word, known)) else otherwise


def describe(annotation: Any) -> str:
    """What YAML could say here: "a whole number or null"."""
    return " or ".join(dict.fromkeys(_words(annotation))) or "nothing that a YAML can say"


def _words(annotation: Any) -> list[str]:
    origin, args = get_origin(annotation) or annotation, get_args(annotation)
    if origin in UNIONS:
        members = sorted(args, key=lambda member: member is types.NoneType)  # null is said last
        return [word for member in members for word in _words(member)]
    if origin is Literal:
        return [repr(choice) if isinstance(choice, str) else str(choice).lower() for choice in args]
    if origin in LISTS:
        if not args or args[0] is Any:
            return ["a list"]
        size = (
            f" {len(args)}: {', '.join(map(describe, args))}" if _is_fixed(origin, args) else f": {describe(args[0])}"
        )
        return [f"a list of{size}"]
    if origin in MAPPINGS:
        return ["a mapping" + (f" of names to {describe(args[1])}" if args and args[1] is not Any else "")]
    return ["anything"] if origin is Any else [PLAIN[origin][0]] if origin in PLAIN else []
