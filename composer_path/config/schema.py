"""What a section of a YAML is: keys with their types, rules and defaults, read from the signatures that get them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from composer.core import Time
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from composer_path.config.rules import check_interval, check_moment, is_time
from composer_path.config.types import choices_of, fits, mentions, resolve_annotation


class NoDefault(Enum):
    """Stands in place of a default: the key must be given, or it has one that a YAML can't say (an object)."""

    REQUIRED = "required"
    ABSENT = "absent"


REQUIRED, ABSENT = NoDefault


@dataclass(frozen=True)
class Key:
    """One value: its type, its default and further rules, which hold for each item where it is a list."""

    annotation: Any
    default: Any = REQUIRED
    at_least: int | None = None
    check: Callable[[Any], None] | None = None  # of what isn't null; raises ValueError


@dataclass(frozen=True)
class Section:
    """A mapping of known keys.

    Attributes:
        keys: What it may hold.
        default: None, `{}`, or a `NoDefault`. Null means `{}` too, unless the default is None.
        refused: Keys that it may not hold, and what to do instead.
        members: What stands under any other key, where names are free.
        open: Other keys are passed on unchecked.
    """

    keys: Mapping[str, Key | Section | Choice]
    default: Any = None
    refused: Mapping[str, str] = field(default_factory=dict)
    members: Section | None = None
    open: bool = False


@dataclass(frozen=True)
class Choice:
    """A mapping whose key `selector` says which other keys there are: `{name: adamw, …}`."""

    selector: str
    sections: Mapping[Any, Section]
    default: Any = None
    selected: Any = None  # where the selector is left out

    def section(self, selected: Any) -> Section | None:
        """The section of a name; None where there is none."""
        return next((section for name, section in self.sections.items() if fits(selected, Literal[name])), None)


Node = Key | Section | Choice


def join(path: str, key: Any) -> str:
    """The path of a key below another."""
    return f"{path}.{key}" if path else str(key)


def complete(config: DictConfig, node: Section | Choice, path: str = "") -> Iterator[str]:
    """Fill in what a section, and those in it, leave out; yields a line for each that can't be filled in."""
    section = _chosen(config, node) if isinstance(node, Choice) else node
    if section is None:
        return
    given: Any = OmegaConf.to_container(config, resolve=False)
    for key, part in section.keys.items():
        if key not in given and not isinstance(part.default, NoDefault):
            config[key] = part.default
        elif given.get(key, "") is None and not isinstance(part, Key) and part.default in ({}, ABSENT):
            config[key] = {}
    for key in config:
        part = section.keys.get(str(key), section.members)  # type: ignore[assignment]
        try:
            child = None if part is None or isinstance(part, Key) else config[key]
        except OmegaConfBaseException:
            continue  # said when it is filled in
        where = join(path, key)
        if isinstance(child, dict):  # made by a resolver, anew each time
            yield f"{where}: found {given[key]}; a section is written out, or another section's: ${{name}}"
        elif isinstance(child, DictConfig):
            yield from complete(child, part, where)  # type: ignore[arg-type]


def _chosen(config: DictConfig, choice: Choice) -> Section | None:
    try:
        if config.get(choice.selector) is None and choice.selected is not None:
            config[choice.selector] = choice.selected
        return choice.section(config.get(choice.selector))
    except OmegaConfBaseException:
        return None


def section_of(
    *functions: Callable[..., Any],
    leave_out: tuple[str, ...] = (),
    refused: Mapping[str, str] | None = None,
    changes: Mapping[str, Section | Choice | dict[str, Any]] | None = None,
    default: Any = None,
) -> Section:
    """The keywords of a function or class as a section.

    Args:
        *functions: The constructor, and those to which it passes its further keywords on; the first signature that has
            a keyword counts.
        leave_out: Keywords that the run itself supplies.
        refused: Keywords that another key of the YAML says, and which.
        changes: Keys that are sections themselves, or in which fields of `Key` a key differs from the signature.
        default: See `Section`.
    """
    changes, refused = changes or {}, refused or {}
    keys: dict[str, Node] = {}
    kinds: set[Any] = set()
    for function in functions:
        call = function.__init__ if inspect.isclass(function) else function  # type: ignore[misc]
        parameters = [p for p in inspect.signature(call).parameters.values() if p.name != "self"]
        kinds = {parameter.kind for parameter in parameters}
        for p in parameters:
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.name in (*leave_out, *refused, *keys):
                continue
            change = changes.get(p.name, {})
            if isinstance(change, dict):
                more = {"default": REQUIRED if p.default is p.empty else p.default, **change}
                annotation = more.pop("annotation", None) or resolve_annotation(p, call)
                keys[p.name] = key_of(p.name, annotation, **more)
            else:
                keys[p.name] = change
    # Composer's base classes take (*args, **kwargs) and drop them: their heirs without an __init__ have no keywords.
    passes_on = inspect.Parameter.VAR_KEYWORD in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds
    return Section(keys, default, refused, open=passes_on)


def key_of(name: str, annotation: Any, default: Any, **fields: Any) -> Key:
    """A key of a constructor; times, which libraries also call text, are checked as what their name says."""
    if "off" in (words := choices_of(annotation)):
        annotation = Literal[(*words, False)]  # YAML reads a bare off as false
    repeated = name.endswith(("interval", "half_life"))
    rules: dict[str, Any] = {}
    if mentions(annotation, Time) or (mentions(annotation, str) and (repeated or is_time(default))):
        rules["check"] = check_interval if repeated else check_moment
    elif name.endswith("interval"):
        rules["at_least"] = 1
    plain = default if isinstance(default, NoDefault) else _plain(default)
    unsayable = not isinstance(plain, NoDefault) and not fits(plain, annotation)
    return Key(annotation, ABSENT if unsayable else plain, **rules | fields)


def _plain(value: Any) -> Any:
    """A default as a YAML says it; `ABSENT` where it has no word for it."""
    if isinstance(value, tuple | list):
        items = [_plain(item) for item in value]
        return ABSENT if ABSENT in items else items
    sayable = value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))
    return value if sayable else ABSENT
